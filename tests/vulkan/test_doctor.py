"""The doctor's lines about Vulkan, on any machine."""

from __future__ import annotations

import pytest
from fake import DEVICE

from aat_hf import doctor
from aat_hf.vulkan import guard, provider
from aat_hf.vulkan.probe import DRIVER_REMEDY, Probe


def findings(monkeypatch: pytest.MonkeyPatch, found: Probe, installed: list[str]) -> dict[str, doctor.Finding]:
    monkeypatch.setattr(doctor, "probe", lambda: found)
    monkeypatch.setattr(provider, "installed", lambda: installed)
    return {finding.name: finding for finding in doctor._vulkan_devices() + doctor._vulkan_bindings()}


def test_a_missing_driver_has_its_line(monkeypatch: pytest.MonkeyPatch):
    found = findings(monkeypatch, Probe((), "no usable Vulkan driver", DRIVER_REMEDY), [])
    assert found["vulkan"].fix == DRIVER_REMEDY and found["vulkan"].status == doctor.OPTIONAL
    assert found["vulkan/kompute"].fix.startswith("make vulkan")
    assert found["vulkan/vulkan"].fix == 'pip install "aat-hf[vulkan]"'


@pytest.mark.parametrize("verdict", [None, guard.Verdict(True), guard.Verdict(False, "killed by signal 6")])
def test_an_earlier_crash_is_told(verdict: guard.Verdict | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "remembered", lambda name, device: verdict)
    monkeypatch.setattr(guard, "verdict_path", lambda name, device: "verdict.json")
    found = findings(monkeypatch, Probe((DEVICE,)), ["vulkan"])
    assert found["vulkan:0"].detail == "fake, cpu, 0 GiB, Vulkan 1.1.0"
    crashed = verdict is not None and not verdict.passed
    assert found["vulkan/vulkan"].status == (doctor.MISSING if crashed else doctor.OK)
    assert (
        ("killed by signal 6" in found["vulkan/vulkan"].detail)
        == crashed
        == ("verdict.json" in found["vulkan/vulkan"].fix)
    )
