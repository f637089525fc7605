from __future__ import annotations

import os
import subprocess
import sys

from aat_hf.vulkan.guard import BARE


def process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that may crash."""
    return subprocess.run(
        [sys.executable, "-c", BARE + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
