"""What a test does where something it needs is missing: it skips, or fails if AAT_REQUIRE_VULKAN is set."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(reason: str) -> NoReturn:
    if os.environ.get("AAT_REQUIRE_VULKAN"):
        pytest.fail(f"AAT_REQUIRE_VULKAN is set, but {reason}")
    pytest.skip(reason)
