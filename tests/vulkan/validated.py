"""Every shader of the product on one device, for a process in which the validation layers listen.

usage: validated.py BINDING KIND [barriers]; prints the shaders that ran. With a third argument barriers are left out.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch

from aat_hf.kernels import vulkan as kernel
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import TileMap
from aat_hf.vulkan import limits, ops, plain, shapes, smoke, workspace
from aat_hf.vulkan.interface import Provider
from aat_hf.vulkan.probe import probe
from aat_hf.vulkan.provider import make


def attention(dtype: torch.dtype, softcap: float | None, skip_below: float) -> None:
    """Forward and backward of two heads that share their keys; the second tile is cut by the mask."""
    q, k, v = (torch.randn(1, heads, 40, 32).to(dtype).requires_grad_() for heads in (2, 1, 1))
    mask = causal_mask(40, 40, q.device)
    tile_map = TileMap.dense(mask, 1, 2, 32, 32)
    found = kernel.vulkan_skip_attention(q, k, v, tile_map, mask, 0.3, softcap, skip_below)
    (found.output.float().sum() + found.lse.sum()).backward()


def selection(provider: Provider) -> None:
    q, k = torch.randn(1, 2, 40, 32), torch.randn(1, 1, 40, 32)
    ops.tile_moments(provider, k, 32, 2)
    mass = ops.measure_rows(provider, q, k, causal_mask(40, 40, q.device), torch.arange(0, 40, 8), 16, 0.3)
    states, forced = torch.ones(mass.probability.shape, dtype=torch.uint8), torch.zeros(3, dtype=torch.bool)
    ops.select_tiles(provider, mass.probability, forced, states, torch.full((1, 2), 0.1), 1.0)


def plain_operations(provider: Provider) -> None:
    for operation in plain.OPERATIONS:
        inputs = tuple(torch.randn(plain.arity(operation), 20, 20))
        plain.on_device(provider, operation, [inputs, inputs])


def main(binding: str, kind: str, *without: str) -> None:
    if without:
        limits.batches = lambda dispatches: [list(dispatches)] if dispatches else []
    provider = make(binding, dataclasses.replace(probe().devices[0], kind=kind))
    if without and binding == "vulkan":
        provider._barrier = lambda *_: None
    start, ran = provider.start, set()

    def recorded(dispatches, upload=(), download=()):
        ran.update(dispatch.shader for dispatch in dispatches)
        return start(dispatches, upload, download)

    provider.start, kernel.get_provider = recorded, lambda: provider
    smoke.run(provider)
    for subgroups, sent_from in ((shapes.subgroups, workspace._LONG), (lambda device: False, 0)):
        shapes.subgroups, workspace._LONG = subgroups, sent_from
        attention(torch.float32, None, -math.inf)
        selection(provider)
    attention(torch.bfloat16, 5.0, math.log(1e-3))
    plain_operations(provider)
    provider.close()
    print("ran", *sorted(ran))


if __name__ == "__main__":
    main(*sys.argv[1:])
