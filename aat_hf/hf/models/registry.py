"""Making the model types "aat-gpt2" and "aat-bert" known to Transformers' Auto classes."""

from __future__ import annotations

from functools import cache

from transformers import AutoConfig

from aat_hf.hf.models.configuration_aat_bert import AATBertConfig
from aat_hf.hf.models.configuration_aat_gpt2 import AATGPT2Config


def register_configs() -> None:
    """Register the configs; the first config made registers its models, whose code takes time to import."""
    for config in (AATGPT2Config, AATBertConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()  # type: ignore[no-untyped-call]


@cache
def register_models() -> None:
    """Register models and tokenizers for the configs, once."""
    import transformers as tf
    from transformers import BertTokenizer, GPT2Tokenizer

    from aat_hf.hf.models import modeling_aat_bert as bert
    from aat_hf.hf.models import modeling_aat_gpt2 as gpt2

    for auto, config, model in (
        (tf.AutoModel, AATGPT2Config, gpt2.AATGPT2Model),
        (tf.AutoModelForCausalLM, AATGPT2Config, gpt2.AATGPT2LMHeadModel),
        (tf.AutoModel, AATBertConfig, bert.AATBertModel),
        (tf.AutoModelForMaskedLM, AATBertConfig, bert.AATBertForMaskedLM),
        (tf.AutoModelForSequenceClassification, AATBertConfig, bert.AATBertForSequenceClassification),
    ):
        auto.register(config, model, exist_ok=True)
        model.register_for_auto_class(auto.__name__)  # type: ignore[no-untyped-call]
    tf.AutoTokenizer.register(AATGPT2Config, fast_tokenizer_class=GPT2Tokenizer, exist_ok=True)
    tf.AutoTokenizer.register(AATBertConfig, fast_tokenizer_class=BertTokenizer, exist_ok=True)
