"""Started by test_training.py in two processes: `train_distributed.py FOLDER ddp|fsdp`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from training import arguments, language_model, trainer

from aat_hf import AATCallback

STEPS, SAVED = 4, 2


class ShardingAccelerator(Accelerator):
    """Shards on a CPU as on a GPU: Accelerate itself forgets the plugin where there is no GPU, and replicates."""

    def __init__(self, *args: Any, fsdp_plugin: Any = None, **how: Any) -> None:
        super().__init__(*args, **how)
        PartialState().distributed_type = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin


def by_trainer(folder: str, batch: int, resume: bool = False, **how: Any) -> list[dict[str, Any]]:
    """History of a Trainer whose processes share a batch of two, from the start or from its checkpoint."""
    args = arguments(
        folder, per_device_train_batch_size=batch, max_steps=STEPS, save_strategy="steps", save_steps=SAVED, **how
    )
    model = language_model(geometry="hyperbolic", learn_curvature=True)
    trained = trainer(model, args, [AATCallback(layer_steps=2)])
    assert args.world_size * batch == 2
    trained.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{SAVED}")) if resume else None)
    if "fsdp" in how:
        kinds = {type(parameter) for parameter in trained.model.parameters()}
        assert kinds == {torch.distributed.tensor.DTensor}, kinds
    return trained.state.log_history


def main(folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    if kind == "fsdp":
        tf.trainer.Accelerator = ShardingAccelerator
        how: dict[str, Any] = dict(fsdp=True, fsdp_config={"version": 2})
        found = [by_trainer(folder, batch=1, resume=resume, **how) for resume in (False, True)]
    else:  # whose checkpoint is that of one process
        found = [by_trainer(folder, batch=1)]
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # nobody leaves while another still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
