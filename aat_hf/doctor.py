"""`aat doctor`: what is installed and usable here, and the line that mends what is not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from aat_hf.data.packaged import GEMMA3, MINILM, QWEN05, SMOLLM2
from aat_hf.data.pretrained import cache_dir
from aat_hf.vulkan import guard, provider
from aat_hf.vulkan.probe import probe

OK, OPTIONAL, MISSING = "ok", "optional", "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: Versions, devices, backends or caches.
        name: What it is.
        status: "ok", "optional" (absent, and nothing breaks) or "missing" (something breaks).
        detail: Version, size, or why it is absent.
        fix: The command or setting that mends it, empty when nothing is to be done.
    """

    group: str
    name: str
    status: str
    detail: str
    fix: str = ""


_REQUIRED = {"torch": "2.10", "transformers": "5.17", "numba": "", "numpy": ""}
_EXTRAS = {
    "gguf": ("demo", "packaged models"),
    "accelerate": ("demo", "packaged models, training"),
    "rich": ("demo", "progress bars"),
    "datasets": ("train", "training examples"),
    "evaluate": ("train", "metrics"),
    "matplotlib": ("viz", "plots"),
    "plotly": ("viz", "interactive plots"),
    "vulkan": ("vulkan", "Vulkan backend"),
}


def run(*, as_json: bool = False) -> int:
    """Print the findings; 1 when something needed is missing, else 0."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(render(findings))
    return int(any(finding.status == MISSING for finding in findings))


def examine() -> list[Finding]:
    """Look at everything; a look that fails is itself a finding."""
    looks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("versions", _versions),
        ("devices", _devices),
        ("backends", _backends),
        ("caches", _caches),
    )
    findings: list[Finding] = []
    for group, look in looks:
        try:
            findings += look()
        except Exception as error:  # a broken install must not keep the rest from being told
            findings.append(Finding(group, "check", MISSING, f"{type(error).__name__}: {error}", _reinstall()))
    return findings


def render(findings: list[Finding]) -> str:
    """The findings as text, a group at a time, each fix below its finding."""
    marks = {OK: "ok", OPTIONAL: "--", MISSING: "!!"}
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines += [*([""] if lines else []), group]
        lines.append(f"  {marks[finding.status]} {finding.name.ljust(width)}  {finding.detail}")
        if finding.fix:
            lines.append(f"     {' ' * width}  -> {finding.fix}")
    broken = sum(finding.status == MISSING for finding in findings)
    lines += ["", f"{broken} to mend (!!)" if broken else "Nothing to mend."]
    return "\n".join(lines)


def _reinstall() -> str:
    return f"{sys.executable} -m pip install -U aat-hf"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.13.0+cpu gives (2, 13)."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _versions() -> list[Finding]:
    group = "versions"
    found = [Finding(group, "python", OK, f"{platform.python_version()} on {platform.platform()}")]
    found.append(Finding(group, "aat-hf", OK, _version("aat-hf") or "run from its source tree"))
    for name, least in _REQUIRED.items():
        version = _version(name)
        if version is None:
            found.append(Finding(group, name, MISSING, "not installed", f"pip install {name}"))
        elif least and _numbers(version) < _numbers(least):
            detail = f"{version}, at least {least} is needed"
            found.append(Finding(group, name, MISSING, detail, f"pip install -U '{name}>={least}'"))
        else:
            found.append(Finding(group, name, OK, version))
    for name, (extra, purpose) in _EXTRAS.items():
        version = _version(name)
        fix = "" if version else f"pip install 'aat-hf[{extra}]'"
        detail = version or f"not installed ({purpose})"
        found.append(Finding(group, name, OK if version else OPTIONAL, detail, fix))
    return found


def _devices() -> list[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads for torch"
    found = [Finding("devices", "cpu", OK, cpu)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = "ROCm" if torch.version.hip else "CUDA"
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {kind}"
        found.append(Finding("devices", f"cuda:{index}", OK, detail))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        detail = "none that this build of torch can use"
        found.append(Finding("devices", "accelerator", OPTIONAL, detail, _accelerator_fix()))
    elif accelerator.type != "cuda":
        found.append(Finding("devices", accelerator.type, OK, "available"))
    return [*found, *_vulkan_devices()]


def _accelerator_fix() -> str:
    """How to get torch to see a GPU, when there is a sign of one."""
    import torch

    if Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists():
        kind = "CUDA" if Path("/dev/nvidia0").exists() else "ROCm"
        built = torch.version.cuda or torch.version.hip
        if built is None:
            return f"a GPU is here, but torch is a CPU build: install torch's {kind} build"
        return f"a GPU is here: check its driver against torch's build ({built})"
    return ""


def _backends() -> list[Finding]:
    group = "backends"
    found = [Finding(group, "torch", OK, "gather and scaled_dot_product_attention, any device"), *_vulkan_bindings()]
    if find_spec("numba") is None:
        return [*found, Finding(group, "cpu", MISSING, "numba is missing", "pip install numba")]
    from aat_hf.kernels import router
    from aat_hf.kernels.simd_emit import LANES

    found.append(Finding(group, "cpu", OK, f"compiled kernels, vectors of {LANES} floats"))
    if router.measured():
        return [*found, Finding(group, "router", OK, f"costs of this machine in {router.profile_path()}")]
    return [*found, Finding(group, "router", OPTIONAL, "default costs, this machine was not measured", "aat calibrate")]


def _vulkan_devices() -> list[Finding]:
    devices, reason, remedy = probe()
    if not devices:
        return [Finding("devices", "vulkan", OPTIONAL, reason, remedy)]
    return [
        Finding(
            "devices",
            f"vulkan:{device.index}",
            OK,
            f"{device.name}, {device.kind}, {device.heap_bytes / 2**30:.0f} GiB, Vulkan {device.api_version}",
        )
        for device in devices
    ]


def _vulkan_bindings() -> list[Finding]:
    """The providers, and what an earlier smoke test found."""
    found = []
    for name, install in provider.INSTALL.items():
        if name not in provider.installed():
            detail = f"the Vulkan binding {guard.PACKAGES[name]} is not installed"
            found.append(Finding("backends", f"vulkan/{name}", OPTIONAL, detail, install))
            continue
        verdicts = {device: guard.remembered(name, device) for device in probe().devices}
        failed = [
            Finding(
                "backends",
                f"vulkan/{name}",
                MISSING,
                f"failed its smoke test on {device.name}: {verdict.reason}",
                f"update the driver, then delete {guard.verdict_path(name, device)}",
            )
            for device, verdict in verdicts.items()
            if verdict is not None and not verdict.passed
        ]
        found += failed or [Finding("backends", f"vulkan/{name}", OK, f"Vulkan binding {guard.PACKAGES[name]}")]
    return found


def _caches() -> list[Finding]:
    group = "caches"
    cache = cache_dir()
    origin = "AAT_CACHE" if os.environ.get("AAT_CACHE") else "default; AAT_CACHE moves it"
    nearest = next(path for path in (cache, *cache.parents) if path.exists())
    if os.access(nearest, os.W_OK):
        found = [Finding(group, "aat_hf", OK, f"{cache} ({origin})")]
    else:
        fix = "export AAT_CACHE=/a/folder/you/may/write/to"
        found = [Finding(group, "aat_hf", MISSING, f"{cache} is not writable", fix)]
    fetchers = {"fetch_smollm2": SMOLLM2, "fetch_minilm": MINILM, "fetch_qwen05": QWEN05, "fetch_gemma3": GEMMA3}
    for fetcher, model in fetchers.items():
        if (cache / "models" / model.folder / "config.json").is_file():
            found.append(Finding(group, model.folder, OK, "converted"))
        else:
            fix = f'python -c "import aat_hf.data as d; d.{fetcher}()"'
            found.append(Finding(group, model.folder, OPTIONAL, "fetched on first use", fix))
    return found
