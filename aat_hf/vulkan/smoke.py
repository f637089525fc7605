"""Two dependent dispatches whose result is known: what `guard` runs in a process of its own, because it may crash."""

from __future__ import annotations

import numpy as np

from aat_hf.vulkan.guard import SMOKE_SHADER
from aat_hf.vulkan.interface import Dispatch, Provider, float_bits
from aat_hf.vulkan.probe import probe
from aat_hf.vulkan.provider import make

_COUNT, _GROUP = 1000, 32


def run(provider: Provider) -> None:
    """Compute (x * 2 + 1) * 2 + 1 of 1000 numbers.

    Raises:
        RuntimeError: the result is wrong.
    """
    first, second, third = (provider.buffer(4 * _COUNT) for _ in range(3))
    values = np.arange(_COUNT, dtype=np.float32)
    first.view().view(np.float32)[:] = values
    groups, push = (-(-_COUNT // _GROUP), 1, 1), (_COUNT, float_bits(2.0))
    steps = [Dispatch(SMOKE_SHADER, pair, groups, (_GROUP, 1), push) for pair in ((first, second), (second, third))]
    provider.submit(steps, upload=[first], download=[third])
    result = third.view().view(np.float32)
    if not np.array_equal(result, 4 * values + 3):
        wrong = int((result != 4 * values + 3).sum())
        raise RuntimeError(f"{wrong} of {_COUNT} results are wrong")


def main(name: str, index: str) -> None:
    """Run on one device and close it."""
    device = next(device for device in probe().devices if device.index == int(index))
    provider = make(name, device)
    run(provider)
    provider.close()
