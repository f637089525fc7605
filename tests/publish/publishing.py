"""A trained tiny model with its dense twin and its evaluation, and the command that publishes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tiny_model import byte_tokenizer

import aat_hf
from aat_hf import cli

ROOT = Path(__file__).parents[2]
SMALL = dict(
    tolerance=0.3, query_tile=16, key_tile=16, min_length=0, dense_prefix=0, max_kept=1.0, sample_stride=8,
    local_keys=0, sink_keys=0, backend="gather",
)  # fmt: skip
LENGTH = 128


class Bytes(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder: Path, attention: str) -> tf.Trainer:
    tf.set_seed(0)
    config = aat_hf.AATGPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH, bos_token_id=256, eos_token_id=256,
        aat=SMALL,
    )  # fmt: skip
    model = aat_hf.AATGPT2LMHeadModel._from_config(config, attn_implementation=attention)
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=12, logging_steps=1, per_device_train_batch_size=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = tf.Trainer(
        model, arguments, train_dataset=Bytes(), eval_dataset=Bytes(), processing_class=byte_tokenizer(),
        callbacks=[aat_hf.AATCallback()] if attention == "aat" else [],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return trainer


def publish(trained: Path, target: Path, *more: str) -> int:
    options = ["--eval", str(trained / "eval"), "--license", "apache-2.0", "--license-file", str(ROOT / "LICENSE")]
    return cli.main(["publish", str(trained), str(target), *options, "--data", "bytes", "--hardware", "a CPU", *more])


def log_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
