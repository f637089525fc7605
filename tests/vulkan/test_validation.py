"""The Khronos validation layers, with synchronisation validation, find nothing in what the product submits."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absent import absent
from bare_process import process

from aat_hf.vulkan import build_shaders, loader
from aat_hf.vulkan.interface import DeviceInfo

pytestmark = pytest.mark.vulkan
LAYER = "VK_LAYER_KHRONOS_validation"
LAYERS = {
    "VK_INSTANCE_LAYERS": LAYER,
    "VK_LAYER_ENABLES": "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT",
    "VK_KHRONOS_VALIDATION_VALIDATE_SYNC": "true",
}
CHAINS = """
import dataclasses, sys
import numpy as np
from aat_hf.vulkan import limits, provider
from aat_hf.vulkan.interface import Dispatch, float_bits
from aat_hf.vulkan.probe import probe
{change}
made = provider.make("{binding}", dataclasses.replace(probe().devices[0], kind="{kind}"))
x, y = made.buffer(400), made.buffer(400)
def step(source, target):
    return Dispatch("smoke", (source, target), (4, 1, 1), (32, 1), (100, float_bits(1.0)))
x.view()[:] = 0
made.submit([step(x, y), step(y, x)] * 25, upload=[x, y], download=[x, y])
made.submit([step(x, x)], upload=[x], download=[x])
made.submit([step(x, y)], upload=[x], download=[x, y])
made.submit([], upload=[x], download=[x])
print("result", int(y.view().view(np.float32)[0]))
made.release(x)
made.close()
"""


@pytest.fixture(scope="module", autouse=True)
def layers(device: DeviceInfo) -> None:
    count, size = ctypes.c_uint32(), 520  # bytes of VkLayerProperties, which begins with the name
    loader.library().vkEnumerateInstanceLayerProperties(ctypes.byref(count), None)
    found = ctypes.create_string_buffer(size * count.value)
    loader.library().vkEnumerateInstanceLayerProperties(ctypes.byref(count), found)
    if not any(found.raw[at:].startswith(LAYER.encode()) for at in range(0, len(found), size)):
        absent("the validation layers are not installed (Debian: vulkan-validationlayers)")


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if "VUID" in line or "SYNC-HAZARD" in line or "Validation" in line]


@pytest.mark.parametrize("kind", ["cpu", "discrete"])
def test_chains_of_submissions_are_clean(binding: str, kind: str):
    done = process(CHAINS.format(binding=binding, kind=kind, change=""), **LAYERS)
    assert done.returncode == 0, done.stderr
    assert not complaints(done.stdout + done.stderr)
    assert "result 52" in done.stdout


def test_a_chain_without_barriers_is_not(binding: str):
    """Else the test above could not fail."""
    change = "limits.batches = lambda dispatches: [list(dispatches)] if dispatches else []"
    done = process(CHAINS.format(binding=binding, kind="discrete", change=change), **LAYERS)
    assert any("SYNC-HAZARD" in line for line in complaints(done.stdout + done.stderr)), done.stderr


def every_shader(binding: str, *without: str) -> tuple[set[str], list[str]]:
    """The shaders that ran, and what the layers said."""
    command = [sys.executable, str(Path(__file__).with_name("validated.py")), binding, "discrete", *without]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, **LAYERS, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:]), complaints(done.stdout + done.stderr)


def test_every_shader_is_clean(binding: str):
    ran, said = every_shader(binding)
    assert ran == {source.stem for source in build_shaders.sources()}
    assert not said


@pytest.mark.parametrize("binding", ["vulkan"], indirect=True)
def test_shaders_without_barriers_are_not(binding: str):
    """A barrier after the uploads and one before the downloads are missing, with every shader."""
    ran, said = every_shader(binding, "barriers")
    assert len([line for line in said if "SYNC-HAZARD" in line]) > len(ran)
