"""Adaptive attention tiling for Transformers: `import aat_hf`, then `attn_implementation="aat"`."""

from aat_hf.attention import TiledAttentionResult, tiled_attention
from aat_hf.config import AATConfig
from aat_hf.errors import UnsupportedAttentionError
from aat_hf.hf.explain import explain
from aat_hf.hf.interface import register
from aat_hf.hf.module import QuantumGeometricAttention
from aat_hf.hf.settings import configure
from aat_hf.report.record import Report, record
from aat_hf.tiling.selectors import register_selector
from aat_hf.tiling.tile_map import TileMap

__version__ = "0.1.0"

__all__ = [
    "AATConfig",
    "QuantumGeometricAttention",
    "Report",
    "TileMap",
    "TiledAttentionResult",
    "UnsupportedAttentionError",
    "configure",
    "explain",
    "record",
    "register",
    "register_selector",
    "tiled_attention",
]

register()
