"""Tile maps of whole calls."""

from __future__ import annotations

import weakref

import pytest
import torch
from inputs import peaked

from aat_hf import attention
from aat_hf.tiling import plan as planning
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.select import Scene


@pytest.mark.parametrize("batch,heads,kv_heads", [(1, 6, 3), (2, 4, 4), (1, 4, 1)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
def test_heads_planned_in_groups_get_the_maps_of_the_whole(
    small, monkeypatch, batch, heads, kv_heads, with_sinks, coarse
):
    q, k, _ = peaked(batch, heads, kv_heads, 300, 300, 16)
    mask = causal_mask(300, 300, q.device)
    sinks = torch.linspace(-1, 1, heads) if with_sinks else None
    scene = Scene.of(q, k, mask, 0.25, small.replace(coarse=coarse), None, sinks)
    whole, expected, cells = planning.plan(scene, with_cells=True)
    monkeypatch.setitem(planning._GROUP_BYTES, "cpu", 1)
    seen = []
    monkeypatch.setattr(planning, "_planned", lambda *part, of=planning._planned: seen.append(part) or of(*part))
    parts, found, of_parts = planning.plan(scene, with_cells=True)
    assert len(seen) == kv_heads
    assert torch.equal(parts.to_dense(), whole.to_dense()) and torch.equal(parts.cut, whole.cut)
    assert torch.allclose(found, expected)
    assert all(torch.allclose(x, y) for x, y in zip(of_parts, cells, strict=True))
    assert 0 < float(whole.density.mean()) < 1


def test_what_a_selection_holds_is_free_before_the_kernel_runs(small, monkeypatch):
    """Rounded keys and moments would lie beside the output, where memory peaks."""
    q, k, v = peaked(1, 2, 2, 300, 300, 16)
    scenes, left = [], []

    def plan(scene, *how):
        scenes.append(weakref.ref(scene))
        return planning.plan(scene, *how)

    def kernel(*how, of=attention._kept_attention):
        left.extend(scene() for scene in scenes)
        return of(*how)

    monkeypatch.setattr(attention, "plan", plan)
    monkeypatch.setattr(attention, "_kept_attention", kernel)
    assert attention.tiled_attention(q, k, v, config=small, is_causal=True).path == "tiled"
    assert left == [None]
