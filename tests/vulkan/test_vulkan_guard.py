"""What kills a process in a binding ends in an error of ours; each runs in a process of its own, to be sure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from bare_process import process

from aat_hf.vulkan import guard, provider
from aat_hf.vulkan.errors import VulkanUnavailableError

NO_DRIVER = {"VK_ICD_FILENAMES": "/nowhere.json", "VK_DRIVER_FILES": "/nowhere.json"}

SETUP = """
import os
import sys
import threading
import numpy as np
from pathlib import Path
from aat_hf.vulkan import guard, provider as providers
from aat_hf.vulkan.errors import VulkanError
from aat_hf.vulkan.interface import Dispatch
from aat_hf.vulkan.probe import probe
from aat_hf.vulkan.smoke import run

guard.check = lambda name, device: None  # its process takes seconds

def open_device():
    return providers.make("{binding}", probe().devices[0])

def dispatch(x, y, shader="smoke", groups=(4, 1, 1), spec=(32, 1), push=(100, 0)):
    return Dispatch(shader, (x, y), groups, spec, push)
"""

# name: code that must raise, and words of its message; the same device must compute afterwards
FAULTS = {
    "size of 4 GiB": ("made.buffer(2**32 + 16)", "longer than"),
    "size zero": ("made.buffer(0)", "at least 1"),
    "released tensor": ("y.view(); made.release(y); made.submit([dispatch(x, y)])", "was released"),
    "empty SPIR-V": ("Path('e.spv').write_bytes(b''); made.submit([dispatch(x, y, 'e.spv')])", "no valid SPIR-V"),
    "truncated SPIR-V": (
        "Path('t.spv').write_bytes(providers.shader_code('smoke')[:402]); made.submit([dispatch(x, y, 't.spv')])",
        "no valid SPIR-V",
    ),
    "too many workgroups": ("made.submit([dispatch(x, y, groups=(2**31, 1, 1))])", "workgroups"),
    "workgroup too large": ("made.submit([dispatch(x, y, spec=(2**20, 1))])", "workgroups of"),
    "push constants of another size": ("made.submit([dispatch(x, y, push=(1,) * 64)])", "push constants"),
    "constants as floats": ("made.submit([dispatch(x, y, spec=(32, 2**40))])", "unsigned"),
    "too few buffers": ("made.submit([Dispatch('smoke', (x,), (1, 1, 1), (32, 1), (1, 0))])", "binds buffers"),
    "view after release": ("made.release(y); y.view()", "was released"),
}

FAULT = """
os.chdir({folder!r})
for name, (code, _) in {faults!r}.items():
    made = open_device()
    x, y = made.buffer(400), made.buffer(400)
    try:
        exec(code)
        print(name, "| no error", flush=True)
    except VulkanError as error:
        run(made)
        print(name, "|", type(error).__name__, error, flush=True)
    made.close()
"""

OUT_OF_MEMORY = """
import resource
from aat_hf.vulkan.buffers import BufferPool
made = open_device()
run(made)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
kept, pool = made.buffer(4096), BufferPool(made, 1 << 40)
kept.view()[:] = 7
try:
    buffers = [pool.acquire(16 << 20) for _ in range(16)]
except VulkanError as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run(made)
assert np.all(kept.view() == 7)
print("intact")
"""

FORK = """
made = providers.get_provider("{binding}")
assert providers.get_provider("{binding}") is made
run(made)
child = os.fork()
if not child:
    status = 1
    try:
        run(made)
    except VulkanError as error:
        print(error, flush=True)
        again = providers.get_provider("{binding}")
        assert again is not made and providers.get_provider("{binding}") is again
        run(again)
        del made
        again.close()
        status = 0
    os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
run(made)
print("parent intact")
"""

EXIT = """
made = providers.get_provider("{binding}")
x, y = made.buffer(4 << 20), made.buffer(4 << 20)
def work():
    while True:
        try:
            made.submit([dispatch(x, y, groups=(2**15, 1, 1), push=(1 << 20, 0))], upload=[x], download=[y])
        except VulkanError as error:
            return
threading.Thread(target=work, daemon=True).start()
import time
time.sleep(0.2)
print("leaving", flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AAT_CACHE", str(tmp_path))
    guard.check.cache_clear()
    yield tmp_path / "vulkan"
    guard.check.cache_clear()


@pytest.fixture(scope="module")
def told(binding: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each fault ended in; those after a crash are missing."""
    code = SETUP.format(binding=binding) + FAULT.format(folder=str(tmp_path_factory.mktemp("spv")), faults=FAULTS)
    done = process(code)
    lines = [line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line]
    return {**dict(lines), "end": f"status {done.returncode}\n{done.stderr}"}


@pytest.mark.vulkan
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_and_the_device_goes_on(told: dict[str, str], fault: str):
    assert fault in told, told["end"]
    assert "Error " in told[fault] and FAULTS[fault][1] in told[fault]


@pytest.mark.vulkan
def test_no_driver_is_an_error(binding: str):
    code = SETUP.format(binding=binding) + f"providers.get_provider({binding!r})"
    done = process(code, **NO_DRIVER)
    assert done.returncode == 1 and "VulkanUnavailableError" in done.stderr and "install" in done.stderr


@pytest.mark.vulkan
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_out_of_memory_is_an_error_and_data_stays(binding: str):
    done = process(SETUP.format(binding=binding) + OUT_OF_MEMORY)
    assert done.returncode == 0, done.stderr
    assert "OutOfDeviceMemoryError" in done.stdout and "intact" in done.stdout


@pytest.mark.vulkan
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_process_opens_the_device_again(binding: str):
    done = process((SETUP + FORK).format(binding=binding))
    assert done.returncode == 0, done.stderr
    assert "call get_provider again" in done.stdout and "parent intact" in done.stdout


@pytest.mark.vulkan
def test_work_in_flight_at_exit_is_awaited(binding: str):
    done = process((SETUP + EXIT).format(binding=binding))
    assert (done.returncode, done.stdout.strip()) == (0, "leaving"), done.stderr


def test_unknown_names_are_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(VulkanUnavailableError, match="'metal'; there are kompute, vulkan"):
        provider.get_provider("metal")
    monkeypatch.setattr(provider, "find_spec", lambda name: None)
    monkeypatch.setattr(provider, "_found", set())
    with pytest.raises(VulkanUnavailableError, match=r"pip install .aat-hf\[vulkan\]"):
        provider.get_provider()
    with pytest.raises(VulkanUnavailableError, match="make vulkan"):
        provider.get_provider("kompute")


@pytest.mark.vulkan
def test_devices_that_are_not_there_are_told(binding: str, device, cache: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(VulkanUnavailableError, match=f"no Vulkan device 99; there are {device.index}: "):
        provider.get_provider(binding, 99)
    monkeypatch.setenv("AAT_VULKAN_DEVICE", "first")
    with pytest.raises(VulkanUnavailableError, match="AAT_VULKAN_DEVICE='first'"):
        provider.get_provider(binding)


@pytest.mark.vulkan
def test_the_environment_chooses(binding: str, device, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "smoke_test", lambda *_: guard.Verdict(True))
    monkeypatch.setenv("AAT_VULKAN_PROVIDER", binding)
    monkeypatch.setenv("AAT_VULKAN_DEVICE", str(device.index))
    made = provider.get_provider()
    assert (made.name, made.device) == (binding, device)
    assert provider.get_provider(binding, device.index) is made
    made.close()
    assert not made.usable and provider.get_provider() is not made
    provider.get_provider().close()


@pytest.mark.vulkan
def test_a_sound_binding_passes_its_smoke_test_once(binding: str, device, cache: Path, monkeypatch):
    guard.check(binding, device)
    (path,) = cache.iterdir()
    assert path == guard.verdict_path(binding, device) and json.loads(path.read_text())["passed"]
    monkeypatch.setattr(guard, "smoke_test", None)
    guard.check.cache_clear()
    guard.check(binding, device)


@pytest.mark.vulkan
def test_a_crash_disables_a_binding_and_is_remembered(device, cache: Path, tmp_path, monkeypatch: pytest.MonkeyPatch):
    if "kompute" not in provider.installed():
        pytest.skip("the package kp is not installed")
    (tmp_path / "kp.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)  # the process of the smoke test gets this path
    for _ in range(2):
        with pytest.raises(
            VulkanUnavailableError, match=r"'kompute' failed its smoke test.*AAT_VULKAN_PROVIDER=vulkan"
        ):
            provider.get_provider("kompute")
        (path,) = cache.iterdir()
        kept = json.loads(path.read_text())
        assert not kept["passed"] and ("killed by signal 6" in kept["reason"] or sys.platform == "win32")
        monkeypatch.setattr(guard, "smoke_test", None)  # the second time it is read
        guard.check.cache_clear()


@pytest.mark.vulkan
def test_an_automatic_choice_goes_on_to_the_next(device, cache: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    if len(provider.installed()) < 2:
        pytest.skip("only one binding is installed")
    monkeypatch.delenv("AAT_VULKAN_PROVIDER", raising=False)
    monkeypatch.setattr(guard, "smoke_test", lambda name, _: guard.Verdict(name == "vulkan", "it crashed"))
    monkeypatch.setattr(provider, "_providers", {})
    monkeypatch.setattr(provider, "_refused", set())
    made = provider.get_provider()
    assert provider.get_provider() is made and made.name == "vulkan"
    assert caplog.text.count("failed its smoke test") == 1 and "it crashed" in caplog.text
    made.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"passed": true}', "null"])
def test_a_damaged_verdict_is_no_verdict(content: str, tmp_path: Path):
    path = tmp_path / "verdict.json"
    path.write_text(content)
    assert guard._read(path) is None
    guard._write(path, guard.Verdict(False, "it crashed"))
    assert guard._read(path) == guard.Verdict(False, "it crashed")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    guard._write(tmp_path / "file" / "verdict.json", guard.Verdict(True))
    assert "runs again in every process" in caplog.text
