"""Started by test_training.py in two processes: `train_distributed.py FOLDER ddp|fsdp`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import Copies, arguments, language_model, trainer

from aat_hf import AATCallback

STEPS = 4


def by_trainer(folder: str, batch: int) -> list[dict[str, Any]]:
    """History of a Trainer, which replicates the model where there are several processes."""
    args = arguments(folder, per_device_train_batch_size=batch, max_steps=STEPS)
    trained = trainer(language_model(), args, [AATCallback(layer_steps=2)])
    assert args.world_size * batch == 2
    trained.train()
    return trained.state.log_history


def by_hand(rank: int, world: int) -> list[float]:
    """Losses of a plain loop whose model is sharded among the processes, for which the Trainer needs GPUs."""
    model = language_model(geometry="hyperbolic", learn_curvature=True).train()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        ids = Copies().ids[2 * step : 2 * step + 2]
        mine = ids if world == 1 else ids[rank : rank + 1]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def main(folder: str, how: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if how == "ddp":
        found: Any = by_trainer(folder, batch=1)
    else:
        dist.init_process_group("gloo")
        found = by_hand(rank, dist.get_world_size())
        dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
