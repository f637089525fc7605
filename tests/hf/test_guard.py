"""Models that would ignore the name "aat" must refuse it; all others must take it."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aat_hf.hf.guard import install

REFUSED = {
    "bloom": "BloomForCausalLM",
    "mpt": "MptForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
    "falcon": "FalconForCausalLM",
    "xlnet": "XLNetLMHeadModel",
    "deberta_v2": "DebertaV2Model",
    "longformer": "LongformerModel",
}
ACCEPTED = {
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}
SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, n_layer=1, n_embd=16, n_head=2)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The name is known and the guard in place, whatever other tests did."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "aat", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "aat", sdpa_mask)
    install()
    yield


def model_class(family: str, name: str) -> type[PreTrainedModel]:
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def ask(cls: type[PreTrainedModel], name: str | None) -> Any:
    """What the class answers when built with `name`; no weights are made."""
    model = object.__new__(cls)
    nn.Module.__init__(model)
    return model.get_correct_attn_implementation(name, True)


@pytest.mark.parametrize(("family", "name"), REFUSED.items())
def test_families_that_ignore_the_interface_are_refused(family: str, name: str) -> None:
    cls = model_class(family, name)
    with pytest.raises(ValueError, match=name) as raised:
        ask(cls, "aat")
    assert "eager" in str(raised.value) and "ignore" in str(raised.value)
    assert ask(cls, "eager") == "eager"


@pytest.mark.parametrize(("family", "name"), ACCEPTED.items())
def test_families_on_the_interface_are_accepted(family: str, name: str) -> None:
    assert ask(model_class(family, name), "aat") == "aat"
    assert ask(model_class(family, name), None) in ("sdpa", "eager")


def test_building_a_refused_model_raises() -> None:
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        BloomForCausalLM._from_config(BloomConfig(**SMALL), attn_implementation="aat")


def test_changing_the_name_of_a_built_model() -> None:
    bloom = BloomForCausalLM(BloomConfig(**SMALL))
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        bloom.set_attn_implementation("aat")
    assert bloom.config._attn_implementation != "aat"
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        bloom.set_attn_implementation({"": "aat"})
    gpt2 = GPT2LMHeadModel(GPT2Config(**SMALL))
    gpt2.set_attn_implementation("aat")
    assert gpt2.config._attn_implementation == "aat"
    gpt2.set_attn_implementation("eager")
    assert gpt2.config._attn_implementation == "eager"


def test_a_refused_submodel_is_noticed() -> None:
    class Pair(GPT2LMHeadModel):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            self.other = BloomForCausalLM(BloomConfig(**SMALL))

    model = Pair(GPT2Config(**SMALL))
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        model.set_attn_implementation("aat")


def test_installing_twice_wraps_once() -> None:
    before = (PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation)
    install()
    after = (PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation)
    assert before == after


NOTEBOOK = """
class OwnAttention(nn.Module):
    def forward(self, x):
        call = {call}
        return call(x)

class OwnModel({base}):
    config_class = Config
"""


def notebook(monkeypatch: pytest.MonkeyPatch, call: str, base: str) -> type[PreTrainedModel]:
    """A model class whose module has no source file, as in a notebook."""
    module = types.ModuleType("typed_in_cells")
    names = dict(nn=nn, Config=PreTrainedConfig, PreTrainedModel=PreTrainedModel, Llama=LlamaForCausalLM)
    module.__dict__.update(names, Bloom=BloomForCausalLM, ALL_ATTENTION_FUNCTIONS=AttentionInterface())
    exec(NOTEBOOK.format(call=call, base=base), module.__dict__)
    monkeypatch.setitem(__import__("sys").modules, "typed_in_cells", module)
    return module.OwnModel


INTERFACE = 'ALL_ATTENTION_FUNCTIONS.get_interface("aat", None)'


@pytest.mark.parametrize(("call", "base"), [(INTERFACE, "PreTrainedModel"), ("torch.softmax", "Llama")])
def test_classes_from_a_notebook_that_use_the_interface(monkeypatch: pytest.MonkeyPatch, call: str, base: str) -> None:
    cls = notebook(monkeypatch, call, base)
    assert ask(cls, "aat") == "aat"


@pytest.mark.parametrize("base", ["PreTrainedModel", "Bloom"])
def test_classes_from_a_notebook_that_do_not(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    with pytest.raises(ValueError, match="OwnModel"):
        ask(notebook(monkeypatch, "torch.softmax", base), "aat")


def test_nested_names_reach_their_own_model() -> None:
    config = AutoConfig.for_model("llava", text_config=LlamaConfig(**SMALL, intermediate_size=16).to_dict())
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(
            config, attn_implementation={"": "sdpa", "text_config": "aat"}
        )
    assert model.config.text_config._attn_implementation == "aat"
    assert model.config._attn_implementation == "sdpa"
