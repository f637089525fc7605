"""`aat calibrate`: measure what tiled and exact attention cost on this machine and store it for the router."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from aat_hf.bench._inputs import concentrated, random_map
from aat_hf.bench._timing import interleaved
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress
from aat_hf.kernels import router
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.gather import gather_attention
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.plan import plan
from aat_hf.tiling.select import Scene

_KEYS, _DENSITY = 4096, 0.4  # where the kernels are compared
_LENGTHS = (512, 1024, 2048, 4096, 8192)
_SELECTION_SHARE = 0.2  # of SDPA's time, above which a call is too short to be worth it


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 0."""
    if args.device == "vulkan":
        from aat_hf.vulkan import calibrate as vulkan_calibrate  # the device is opened when needed

        return vulkan_calibrate.run(args)
    entries = []
    cases = [(dtype, dim) for dtype in args.dtypes for dim in args.head_dims]
    with progress("Measuring", len(cases)) as update:
        for number, (dtype, dim) in enumerate(cases):
            entries.append(_entry(args, getattr(torch, dtype), dim))
            update(number + 1)
    for entry in entries:
        print(
            "{device} {dtype} head_dim {head_dim}: kernel / (density x SDPA) {forward:.2f} forward, "
            "{backward:.2f} backward; tiled from {shortest} keys".format(**entry)
        )
    notice(f"Wrote {router.save(entries)}")
    return 0


def _entry(args: argparse.Namespace, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    torch.manual_seed(0)
    kernel = cpu_attention if args.device == "cpu" else gather_attention
    scale = dim**-0.5
    q, k, v = (torch.randn(1, args.heads, _KEYS, dim, dtype=dtype, device=args.device, requires_grad=True)
               for _ in range(3))  # fmt: skip
    tile_map, mask = random_map(q, _DENSITY), causal_mask(_KEYS, _KEYS, q.device)
    density = float(tile_map.density.mean())
    with torch.no_grad():
        forward = interleaved(
            {
                "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
                "aat": lambda: kernel(q, k, v, tile_map, mask, scale),
            },
            args.rounds,
        )
    dense = scaled_dot_product_attention(q, k, v, is_causal=True)
    tiled, gradient = kernel(q, k, v, tile_map, mask, scale)[0], torch.randn_like(dense)
    backward = interleaved(
        {
            "sdpa": lambda: torch.autograd.grad(dense, (q, k, v), gradient, retain_graph=True),
            "aat": lambda: torch.autograd.grad(tiled, (q, k, v), gradient, retain_graph=True),
        },
        args.rounds,
    )
    return {
        "device": args.device,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": dim,
        "forward": forward["aat"].median / forward["sdpa"].median / density,
        "backward": backward["aat"].median / backward["sdpa"].median / density,
        "shortest": _shortest(args, dtype, dim),
    }


def _select(*scene: Any) -> None:
    plan(Scene.of(*scene))


@torch.no_grad()
def _shortest(args: argparse.Namespace, dtype: torch.dtype, dim: int) -> int:
    """Fewest keys of `_LENGTHS` at which selection takes at most `_SELECTION_SHARE` of SDPA's time."""
    config, scale = AATConfig(dense_prefix=256), dim**-0.5
    for keys in _LENGTHS:
        q, k, v = concentrated(keys, args.heads, dim, dtype, args.device)
        mask = causal_mask(keys, keys, q.device)
        times = interleaved(
            {
                "sdpa": partial(scaled_dot_product_attention, q, k, v, is_causal=True),
                "select": partial(_select, q, k, mask, scale, config),
            },
            args.rounds,
        )
        if times["select"].median <= _SELECTION_SHARE * times["sdpa"].median:
            return keys
    return 2 * _LENGTHS[-1]
