"""Compile the shaders of this package: `python -m aat_hf.vulkan.build_shaders` (or `make shaders`); needs glslc.

`manifest.json` holds the hash of every source and binary and the compiler's version, so that a test can tell without
a compiler whether the binaries belong to the sources, and with the same compiler make them anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from aat_hf.vulkan.interface import SHADERS

MANIFEST = "manifest.json"
_COMMAND = ("-O", "--target-env=vulkan1.1")
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def main() -> int:
    """Compile every `.comp` beside the manifest and write the manifest; 1 without a compiler."""
    if shutil.which("glslc") is None:
        print("glslc is missing: apt-get install glslc, brew install shaderc, or the Vulkan SDK", file=sys.stderr)
        return 1
    for source in sources():
        compile_shader(source, source.with_suffix(".spv"))
    (SHADERS / MANIFEST).write_text(json.dumps(manifest(compiler()), indent=1) + "\n", "utf-8")
    return 0


def sources() -> list[Path]:
    """The shaders of this package, sorted."""
    return sorted(SHADERS.glob("*.comp"))


def compile_shader(source: Path, binary: Path) -> None:
    """GLSL to SPIR-V.

    Raises:
        subprocess.CalledProcessError: the compiler's messages are on standard error.
    """
    subprocess.run(["glslc", *_COMMAND, str(source), "-o", str(binary)], check=True)


def compiler() -> str:
    """Version of the compiler and of the libraries in it."""
    told = subprocess.run(["glslc", "--version"], check=True, capture_output=True, text=True).stdout
    return "; ".join(line.strip() for line in told.splitlines() if line.strip())


def manifest(version: str) -> dict[str, Any]:
    """Hashes of sources (with what they include) and binaries as they lie in the package."""
    shaders = {
        source.stem: {"source": source_hash(source), "binary": _hash(source.with_suffix(".spv").read_bytes())}
        for source in sources()
    }
    return {"compiler": version, "arguments": list(_COMMAND), "shaders": shaders}


def source_hash(source: Path) -> str:
    """Hash of a source and of what it includes, line ends aside."""
    text = source.read_text("utf-8")
    parts = [text, *(source.with_name(name).read_text("utf-8") for name in _included(source, text))]
    return _hash("".join(parts).encode())


def _included(source: Path, text: str) -> list[str]:
    """Names of the files that a source includes, in order, those that they include among them."""
    names: list[str] = []
    for name in _INCLUDE.findall(text):
        names += [name, *_included(source, source.with_name(name).read_text("utf-8"))]
    return names


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
