"""What the configs of adaptive tiled models share: checked settings, and their geometry as a field."""

from __future__ import annotations

from typing import Any

try:
    from aat_hf.config import AATConfig
except ModuleNotFoundError as error:
    raise ImportError(
        "This model attends with adaptive tiles, which the package aat-hf provides: pip install aat-hf"
    ) from error


class AATConfigMixin:
    """Goes before a Transformers config in a class that declares the fields `aat` and `learn_curvature`.

    Attributes:
        aat: the settings that differ from `aat_hf.AATConfig`'s defaults, by name; `layers` holds those of single
            layers, such as {"3": {"tolerance": 0.1}}.
        learn_curvature: learn the curvature of every head, starting at the settings' one; needs a geometry.
    """

    aat: dict[str, Any] | None
    learn_curvature: bool
    _attn_implementation: str | None

    def __post_init__(self, **kwargs: Any) -> None:
        from aat_hf.hf.models.registry import register_models

        register_models()
        super().__post_init__(**kwargs)  # type: ignore[misc]
        AATConfig.from_dict(self.aat or {})
        if self._attn_implementation is None:  # one that was asked for stays
            self._attn_implementation = "aat"

    @property
    def geometry(self) -> str:
        """Space of the attention scores: "euclidean", "hyperbolic" or "spherical"; kept in `aat`."""
        return AATConfig.from_dict(self.aat or {}).geometry

    @geometry.setter
    def geometry(self, name: str) -> None:
        self.aat = {**(self.aat or {}), "geometry": AATConfig(geometry=name).geometry}
