from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from aat_hf.config import AATConfig
from aat_hf.hf.settings import environment

# A run of the suite repeats the last one; HYPOTHESIS_PROFILE=default searches anew.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    environment.cache_clear()  # a test may set variables before its first call


@pytest.fixture
def small() -> AATConfig:
    """Settings that tile even a few hundred tokens."""
    return AATConfig(
        tolerance=0.1,
        query_tile=32,
        key_tile=32,
        sink_keys=32,
        local_keys=32,
        min_length=0,
        dense_prefix=0,
        max_kept=1.0,
        sample_stride=8,
        backend="gather",  # a backend that is named is used, whatever the density
    )
