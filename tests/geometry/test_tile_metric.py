from __future__ import annotations

import pytest
import torch

from aat_hf.geometry.fisher import diagonal_tile_metric, tile_metric
from aat_hf.tiling.moments import summarise


@pytest.mark.parametrize("keys", [1, 63, 64, 150])
def test_tile_moments_are_the_fisher_metric_of_the_keys(keys):
    k = torch.randn(2, 3, keys, 5, dtype=torch.float64)
    moments = summarise(k, 64, 4)
    for place, count in enumerate(moments.count.flatten().tolist()):
        start = place * 16
        mean, metric = tile_metric(k[:, :, start : start + 16]) if count else (torch.zeros(2, 3, 5), torch.zeros(5, 5))
        assert torch.allclose(moments.mean.flatten(2, 3)[:, :, place].double(), mean.double())
        assert torch.allclose(moments.variance.flatten(2, 3)[:, :, place], metric.diagonal(dim1=-2, dim2=-1).double())


def test_the_diagonal_is_that_of_the_full_metric():
    exists = torch.rand(4, 9) < 0.6
    k = torch.randn(4, 9, 3, dtype=torch.float64) * exists[..., None]
    mean, metric = tile_metric(k, exists)
    found, variance = diagonal_tile_metric(k, exists)
    assert torch.allclose(found, mean) and torch.allclose(variance, metric.diagonal(dim1=-2, dim2=-1))
