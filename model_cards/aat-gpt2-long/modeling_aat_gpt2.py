"""GPT-2 with adaptive tiled attention; ordinary GPT-2 checkpoints load unchanged."""

from __future__ import annotations

from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from .configuration_aat_gpt2 import AATGPT2Config
from .modeling_aat import AATModelMixin, add_curvatures


class AATGPT2Model(AATModelMixin, GPT2Model):
    """`GPT2Model` that attends with "aat" unless another implementation is asked for."""

    config: AATGPT2Config
    config_class = AATGPT2Config

    def __init__(self, config: AATGPT2Config) -> None:
        super().__init__(config)
        add_curvatures(self, config, (GPT2Attention,))


class AATGPT2LMHeadModel(AATModelMixin, GPT2LMHeadModel):
    """`GPT2LMHeadModel` on `AATGPT2Model`."""

    config: AATGPT2Config
    config_class = AATGPT2Config

    def __init__(self, config: AATGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.loss_type = "ForCausalLM"  # the library finds it in other classes' names
        self.transformer = AATGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
