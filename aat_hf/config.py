"""`AATConfig`: every setting of adaptive attention tiling in one validated, frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aat_hf.geometry.lift import GEOMETRIES

MODES = ("tiled", "skip", "dense")
BACKENDS = ("auto", "cpu", "gather", "vulkan", "reference")
_RANGES: dict[str, tuple[float, float]] = {
    "query_tile": (16, 1024),
    "key_tile": (16, 1024),
    "summary_keys": (1, 1024),
    "sample_stride": (1, 1024),
    "predict_stride": (1, 1024),
    "sink_keys": (0, 2**31),
    "local_keys": (0, 2**31),
    "dense_prefix": (0, 2**31),
    "audit_rows": (0, 2**20),
    "control_rows": (0, 2**20),
    "seed": (0, 2**63 - 1),
}

_OPTIONAL: dict[str, tuple[float, float]] = {
    "min_length": (0, 2**31),
    "decode_from": (0, 2**31),
}


@dataclass(frozen=True)
class AATConfig:
    """Settings of adaptive attention tiling.

    Attributes:
        tolerance: accepted infidelity, the probability a row may lose on average, in [0, 1); 0 is exact attention.
        mode: "tiled" (select tiles), "skip" (all scores; tiles whose maximum is below tolerance / 2 of the running
            maximum are skipped, the loss has a certificate) or "dense" (exact attention).
        selector: name of a registered tile selector (`aat_hf.tiling.select.SELECTORS`).
        query_tile, key_tile: rows and keys of a tile.
        summary_keys: keys of one summary (count, mean, variance); divides key_tile or is larger.
        sample_stride: every so many query rows one is scored against every key; on a CPU with exponentials to 4 % and,
            where that is faster and accurate enough for the keys, in 8-bit integers.
        predict_stride: every so many query rows one is predicted from the moments.
        sink_keys: the tiles of so many first keys are always exact.
        local_keys: so are the tiles of a query tile's own keys and of so many keys before and after them.
        coarse: give dropped tiles their first-order summary (one centroid) instead of dropping them.
        max_kept: a query tile that would keep more than this fraction of its tiles keeps all of them, in (0, 1].
        dense_prefix: query rows that see at most so many keys are exact.
        min_length: calls with fewer keys than this go to exact attention; None: the break-even length that
            `aat calibrate` measured on this machine; before that 512 per thread on a CPU, 2048 at least, and 2048
            elsewhere.
        decode_from: a single query (a decoding step) that sees at least so many keys reads the values of the heaviest
            tiles only, chosen by their exact probability; with an `aat_hf.AATCache` and mode "tiled" the keys of likely
            tiles only as well, chosen by summaries, and the loss is measured in one step of 17. None: 8192 per
            thread, 16384 at least. On a CPU; elsewhere single queries are exact.
        control_rows: random rows per call whose measured masses check the map before it is used; a head that
            misses its tolerance gets a second pass with more tiles. 0 turns the second pass off.
        audit_rows: random rows per call whose exact log-sum-exp measures the realised infidelity; 0 turns it off.
        audit: "recorded" (only while `aat_hf.record` listens), "always" or "never".
        backend: kernel of the kept tiles: "cpu" (compiled for this processor; float32, bfloat16, float16), "gather"
            (PyTorch, any device), "vulkan" (a Vulkan device, from tensors on the CPU), "reference" (eager, for tests),
            or "auto": "cpu" where it can, "vulkan" where it was measured to be faster, else "gather".
        seed: seed of the random rows.
        geometry: space whose scores are attended with, for models trained with it: "euclidean" (q.k), "hyperbolic"
            (Lorentz inner products) or "spherical" (cosines); see `aat_hf.geometry.lift`.
        curvature: positive c of the curvature -c or c of that space; None: 1 (hyperbolic), 1 / head_dim (spherical).
        layers: changes for single layers, {layer_idx: {field: value}}.

    Raises:
        ValueError: a field is unknown or out of range; the message names field, value and allowed range.
    """

    tolerance: float = 0.05
    mode: str = "tiled"
    selector: str = "mix"
    query_tile: int = 64
    key_tile: int = 16
    summary_keys: int = 16
    sample_stride: int = 16
    predict_stride: int = 4
    sink_keys: int = 64
    local_keys: int = 64
    coarse: bool = False
    max_kept: float = 0.7
    dense_prefix: int = 256
    min_length: int | None = None
    decode_from: int | None = None
    control_rows: int = 64
    audit_rows: int = 64
    audit: str = "recorded"
    backend: str = "auto"
    seed: int = 0
    geometry: str = "euclidean"
    curvature: float | None = None
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _number(self, "tolerance", 0, 1, upper_open=True)
        _number(self, "max_kept", 0, 1, lower_open=True)
        for name, (low, high) in _RANGES.items():
            _integer(self, name, int(low), int(high))
        for name, (low, high) in _OPTIONAL.items():
            if getattr(self, name) is not None:
                _integer(self, name, int(low), int(high))
        _choice(self, "mode", MODES)
        _choice(self, "backend", BACKENDS)
        _choice(self, "audit", ("recorded", "always", "never"))
        _choice(self, "geometry", GEOMETRIES)
        if self.curvature is not None:
            _number(self, "curvature", 0, float("inf"), lower_open=True, upper_open=True)
        if not isinstance(self.coarse, bool):
            raise ValueError(f"AATConfig.coarse = {self.coarse!r}: must be True or False")
        if not isinstance(self.selector, str) or not self.selector:
            raise ValueError(f"AATConfig.selector = {self.selector!r}: must be the name of a selector")
        if self.key_tile > self.summary_keys and self.key_tile % self.summary_keys:
            raise ValueError(f"AATConfig.summary_keys = {self.summary_keys!r}: must divide key_tile = {self.key_tile}")
        object.__setattr__(self, "layers", _layers(self.layers))
        for changes in self.layers.values():
            dataclasses.replace(self, layers={}, **changes)

    @property
    def summaries(self) -> int:
        """Summaries of a key tile."""
        return max(1, self.key_tile // self.summary_keys)

    @property
    def sink_tiles(self) -> int:
        """First key tiles that are always exact."""
        return -(-self.sink_keys // self.key_tile)

    @property
    def local_tiles(self) -> int:
        """Key tiles before and after a query tile's own that are always exact."""
        return -(-self.local_keys // self.key_tile)

    @property
    def flat(self) -> AATConfig:
        """The settings for queries and keys that have been lifted already."""
        return self if self.geometry == "euclidean" else self.replace(geometry="euclidean")

    def replace(self, **changes: Any) -> AATConfig:
        """A copy with `changes`, validated.

        Raises:
            ValueError: an unknown field or a value out of range.
        """
        _known(changes)
        return dataclasses.replace(self, **changes)

    def for_layer(self, layer_idx: int | None) -> AATConfig:
        """The settings of one layer: `layers[layer_idx]` applied."""
        changes = self.layers.get(layer_idx) if layer_idx is not None else None
        return self if not changes else dataclasses.replace(self, layers={}, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        values["layers"] = {str(layer): dict(changes) for layer, changes in self.layers.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AATConfig:
        """Build from `to_dict`'s output or any part of it.

        Raises:
            ValueError: an unknown field or a value out of range.
        """
        _known(values)
        return cls(**dict(values))

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AATConfig:
        """Inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def with_environment(self) -> AATConfig:
        """Apply `AAT_<FIELD>` environment variables (AAT_TOLERANCE, AAT_BACKEND, ...), each a JSON value or a word.

        Raises:
            ValueError: a variable's value is out of range; the message names the variable.
        """
        changes: dict[str, Any] = {}
        for name in _FIELDS:
            text = os.environ.get(f"AAT_{name.upper()}")
            if text is not None:
                changes[name] = _parse(text)
        if not changes:
            return self
        try:
            return self.replace(**changes)
        except ValueError as error:
            names = ", ".join(f"AAT_{name.upper()}={os.environ[f'AAT_{name.upper()}']}" for name in changes)
            raise ValueError(f"environment {names}: {error}") from error


_FIELDS = tuple(f.name for f in dataclasses.fields(AATConfig))


def _known(values: Mapping[str, Any]) -> None:
    unknown = sorted(set(map(str, values)) - set(_FIELDS))
    if unknown:
        raise ValueError(f"AATConfig has no field {', '.join(unknown)}; fields: {', '.join(_FIELDS)}")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _number(
    config: AATConfig, name: str, low: float, high: float, lower_open: bool = False, upper_open: bool = False
) -> None:
    value = getattr(config, name)
    allowed = f"{'(' if lower_open else '['}{low}, {high}{')' if upper_open else ']'}"
    good = isinstance(value, int | float) and not isinstance(value, bool)
    good = good and (low < value if lower_open else low <= value)
    good = good and (value < high if upper_open else value <= high)
    if not good:
        raise ValueError(f"AATConfig.{name} = {value!r}: must be a number in {allowed}")


def _integer(config: AATConfig, name: str, low: int, high: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"AATConfig.{name} = {value!r}: must be an integer in [{low}, {high}]")


def _choice(config: AATConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(
            f"AATConfig.{name} = {getattr(config, name)!r}: must be one of {', '.join(map(repr, allowed))}"
        )


def _layers(layers: Any) -> dict[int, dict[str, Any]]:
    if not isinstance(layers, Mapping):
        raise ValueError(f"AATConfig.layers = {layers!r}: must be {{layer_idx: {{field: value}}}}")
    result: dict[int, dict[str, Any]] = {}
    for layer, changes in layers.items():
        if not str(layer).isdigit() or not isinstance(changes, Mapping):
            raise ValueError(f"AATConfig.layers[{layer!r}] = {changes!r}: must be {{layer_idx >= 0: {{field: value}}}}")
        _known(changes)
        if "layers" in changes:
            raise ValueError(f"AATConfig.layers[{layer}]: 'layers' cannot be nested")
        result[int(layer)] = dict(changes)
    return result
