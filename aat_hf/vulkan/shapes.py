"""Workgroup shapes of the attention shaders: which fit a device, and which one to use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from aat_hf.vulkan.errors import VulkanLimitError
from aat_hf.vulkan.interface import DeviceInfo

LANES, OTHER = 8, 32  # of a team; rows of the visited blocks: as in tiles.glsl
_SHAPES = (
    (64, 8), (128, 4), (64, 4), (128, 2), (32, 8), (32, 4), (64, 2), (32, 2), (256, 2), (256, 1), (128, 1), (64, 1),
    (8, 4), (8, 2), (8, 1),
)  # fmt: skip
_SOFTWARE = ((16, 2), (8, 4), (8, 2), (8, 1))  # small: a software driver compiles long and runs on few threads
_SUMS = 24  # vectors of four that an invocation may hold for sums: with the scores they must fit its registers


@dataclass(frozen=True)
class Shape:
    """Specialisation constants of `tiles.glsl`.

    Attributes:
        threads: invocations of a workgroup, a multiple of `LANES`.
        rows: owned rows of a team.
        chunk: vectors of a row that are in shared memory at a time.
    """

    threads: int
    rows: int
    chunk: int

    @property
    def own(self) -> int:
        """Rows that a workgroup owns."""
        return self.threads // LANES * self.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a workgroup."""
        stride = self.chunk | 1
        return 16 * (self.own * stride + OTHER * stride + self.own * (OTHER // 4 + 1)) + 4 * self.threads + 4

    def sums(self, role: str, head_vectors: int, value_vectors: int) -> int:
        """Vectors of four that an invocation holds for sums; role "forward", "queries" or "keys" (backward)."""
        piece = -(-self.chunk // LANES)
        head, value = (-(-width // self.chunk) * piece * self.rows for width in (head_vectors, value_vectors))
        return {"forward": value, "queries": head, "keys": head + value}[role]


@lru_cache(maxsize=64)
def candidates(device: DeviceInfo, role: str, head_vectors: int, value_vectors: int) -> tuple[Shape, ...]:
    """Shapes that fit the device, the ones likeliest to be fast first.

    Raises:
        VulkanLimitError: none does.
    """
    widest = max(head_vectors, value_vectors)
    found = []
    for threads, rows in _SOFTWARE if device.kind == "cpu" else _SHAPES:
        for pieces in range(1, widest + 1):
            shape = Shape(threads, rows, _chunk(widest, pieces))
            if shape.shared_bytes <= device.max_shared_bytes:
                break
        fits = shape.shared_bytes <= device.max_shared_bytes and threads <= device.max_invocations
        if fits and (rows == 1 or shape.sums(role, head_vectors, value_vectors) <= _SUMS):
            found.append(shape)
    if not found:
        raise VulkanLimitError(
            f"{device.name} has {device.max_shared_bytes} bytes of shared memory, too few for rows of "
            f'{4 * widest} elements: use backend="cpu"'
        )
    return tuple(found)


def _chunk(widest: int, pieces: int) -> int:
    """A row in `pieces` equal chunks; wide ones whole multiples of `LANES`, so that no lane idles."""
    chunk = -(-widest // pieces)
    return -(-chunk // LANES) * LANES if chunk > LANES else chunk


def subgroups(device: DeviceInfo) -> bool:
    """Whether the teams of a workgroup can reduce by subgroup shuffles."""
    return device.subgroup_size >= LANES and "shuffle" in device.subgroup_operations


def variant(shader: str, device: DeviceInfo) -> str:
    """The stem of the `shader` with reductions: through subgroups, or through shared memory where they are missing."""
    return shader if subgroups(device) else f"{shader}_shared"
