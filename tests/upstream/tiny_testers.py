"""What upstream calls a model tester: a tiny random config and inputs for each family."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

import aat_hf


class Tester:
    """Sizes and inputs that the families share; 37 tokens are three tiles of 16, the last one ragged."""

    batch_size = 3
    seq_length = 37
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    intermediate_size = 48
    max_position_embeddings = 64
    pad_token_id = 0
    initializer_range = 0.2  # the default, 0.02, makes attention uniform, and that hides errors
    num_labels = 3
    num_choices = 4
    is_training = True
    model_classes: tuple[type[tf.PreTrainedModel], ...]

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def family(self) -> tf.PreTrainedConfig:
        """The family's own config."""
        raise NotImplementedError

    def get_config(self) -> tf.PreTrainedConfig:
        """The config, with the settings of aat in it; without dropout if aat shall tile, for dropout prevents that."""
        config = self.family()
        if self.settings["tolerance"]:
            for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_probs_dropout_prob"):
                if hasattr(config, name):
                    setattr(config, name, 0.0)
        aat_hf.configure(config, **self.settings)
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[tf.PreTrainedConfig, dict[str, torch.Tensor]]:
        """Config, and inputs whose last sequences are padded on the right."""
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        for row in range(1, self.batch_size):
            mask[row, -5 * row :] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class GPT2Tester(Tester):
    """GPT-2: fused projection, learnt positions."""

    model_classes = (
        tf.GPT2Model,
        tf.GPT2LMHeadModel,
        tf.GPT2ForSequenceClassification,
    )

    def family(self) -> tf.PreTrainedConfig:
        return tf.GPT2Config(
            vocab_size=self.vocab_size,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_inner=self.intermediate_size,
            n_positions=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            initializer_range=self.initializer_range,
            bos_token_id=self.vocab_size - 1,
            eos_token_id=self.vocab_size - 1,
            num_labels=self.num_labels,
        )


class BertTester(Tester):
    """BERT: bidirectional; the multiple-choice head folds the choices into the batch."""

    model_classes = (
        tf.BertModel,
        tf.BertLMHeadModel,
        tf.BertForMaskedLM,
        tf.BertForMultipleChoice,
        tf.BertForSequenceClassification,
    )

    def family(self) -> tf.PreTrainedConfig:
        return tf.BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            initializer_range=self.initializer_range,
            num_labels=self.num_labels,
        )


class LlamaTester(Tester):
    """Llama: grouped keys, rotary positions."""

    num_key_value_heads = 2
    model_classes = (
        tf.LlamaModel,
        tf.LlamaForCausalLM,
        tf.LlamaForSequenceClassification,
    )

    def family(self) -> tf.PreTrainedConfig:
        return tf.LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            initializer_range=self.initializer_range,
            num_labels=self.num_labels,
        )
