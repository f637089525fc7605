"""Adaptive attention tiling for Transformers: `import aat_hf`, then `attn_implementation="aat"`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aat_hf.attention import TiledAttentionResult, tiled_attention
from aat_hf.config import AATConfig
from aat_hf.errors import UnsupportedAttentionError
from aat_hf.hf.cache import AATCache
from aat_hf.hf.explain import explain
from aat_hf.hf.interface import register
from aat_hf.hf.models.registry import register_configs
from aat_hf.hf.module import QuantumGeometricAttention
from aat_hf.hf.settings import configure
from aat_hf.report.record import Report, record
from aat_hf.tiling.selectors import register_selector
from aat_hf.tiling.tile_map import TileMap

if TYPE_CHECKING:
    from aat_hf.hf.callback import AATCallback
    from aat_hf.hf.models.configuration_aat_bert import AATBertConfig
    from aat_hf.hf.models.configuration_aat_gpt2 import AATGPT2Config
    from aat_hf.hf.models.modeling_aat_bert import AATBertForMaskedLM, AATBertForSequenceClassification, AATBertModel
    from aat_hf.hf.models.modeling_aat_gpt2 import AATGPT2LMHeadModel, AATGPT2Model

__version__ = "0.1.0"

__all__ = [
    "AATBertConfig",
    "AATBertForMaskedLM",
    "AATBertForSequenceClassification",
    "AATBertModel",
    "AATCache",
    "AATCallback",
    "AATConfig",
    "AATGPT2Config",
    "AATGPT2LMHeadModel",
    "AATGPT2Model",
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

_ON_USE = {  # names that cost an import of Transformers' models or trainer, and their modules
    "AATBertConfig": "aat_hf.hf.models.configuration_aat_bert",
    "AATBertForMaskedLM": "aat_hf.hf.models.modeling_aat_bert",
    "AATBertForSequenceClassification": "aat_hf.hf.models.modeling_aat_bert",
    "AATBertModel": "aat_hf.hf.models.modeling_aat_bert",
    "AATCallback": "aat_hf.hf.callback",
    "AATGPT2Config": "aat_hf.hf.models.configuration_aat_gpt2",
    "AATGPT2LMHeadModel": "aat_hf.hf.models.modeling_aat_gpt2",
    "AATGPT2Model": "aat_hf.hf.models.modeling_aat_gpt2",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_USE[name]), name)


register()
register_configs()
