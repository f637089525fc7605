"""Tiny models, data and Trainers of the training tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch.utils.data import Dataset

import aat_hf

LENGTH = 160
GPT2 = dict(
    vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
    bos_token_id=1, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip
BERT = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, num_labels=3, initializer_range=0.2,
)  # fmt: skip
SMALL = dict(
    tolerance=0.3, query_tile=16, key_tile=16, min_length=0, dense_prefix=0, max_kept=1.0, sample_stride=8,
    local_keys=0, sink_keys=0, backend="gather",
)  # fmt: skip


class Copies(Dataset):
    """Sequences that repeat a random half; `classes` labels each by its first token instead."""

    def __init__(self, count: int = 64, classes: int | None = None) -> None:
        draw = torch.Generator().manual_seed(7)
        half = torch.randint(3, 61, (count, LENGTH // 2), generator=draw)
        self.ids, self.classes = torch.cat([half, half], 1), classes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids if self.classes is None else int(ids[0]) % self.classes}


def language_model(attention: str = "aat", learn_curvature: bool = False, **settings: Any) -> tf.PreTrainedModel:
    tf.set_seed(0)
    config = aat_hf.AATGPT2Config(**GPT2, aat={**SMALL, **settings}, learn_curvature=learn_curvature)
    return aat_hf.AATGPT2LMHeadModel._from_config(config, attn_implementation=attention)


def classifier(**settings: Any) -> tf.PreTrainedModel:
    tf.set_seed(0)
    return aat_hf.AATBertForSequenceClassification(aat_hf.AATBertConfig(**BERT, aat={**SMALL, **settings}))


def arguments(folder: Any, **changes: Any) -> tf.TrainingArguments:
    defaults = dict(
        output_dir=str(folder), max_steps=6, logging_steps=2, per_device_train_batch_size=2, learning_rate=3e-3,
        report_to=[], save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True, dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )  # fmt: skip
    return tf.TrainingArguments(**{**defaults, **changes})


def trainer(model: Any, args: tf.TrainingArguments, callbacks: Any = (), **how: Any) -> tf.Trainer:
    how.setdefault("train_dataset", Copies())
    return tf.Trainer(model, args, callbacks=list(callbacks), **how)


def losses(trained: tf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def quadratic(progress: float) -> float:
    """A schedule with a name that can be imported."""
    return 0.2 * progress**2
