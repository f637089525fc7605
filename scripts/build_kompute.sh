#!/usr/bin/env bash
# Builds kp 0.9.0, the Python binding of Kompute, into a virtual environment, on Debian and Ubuntu; about three minutes.
# usage: scripts/build_kompute.sh VENV
#
# kp has no wheels, and its sdist asks for numpy < 2 though it runs with numpy 2: hence the build here, and --no-deps.
set -euo pipefail

VERSION=0.9.0
VENV=$(cd "${1:?usage: $0 VENV}" && pwd)
PYTHON=$VENV/bin/python

# To build; to run (loader, software driver); to test (shader compiler, validation layers).
PACKAGES="g++ make cmake libvulkan-dev libfmt-dev
          libvulkan1 mesa-vulkan-drivers
          glslc vulkan-validationlayers"

missing() {
    for package in $PACKAGES; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok' || echo "$package"
    done
}

install_packages() {
    command -v dpkg-query >/dev/null || {
        echo "This recipe is for Debian and Ubuntu. Elsewhere: pip install 'aat-hf[vulkan]' gives the other binding." >&2
        exit 1
    }
    local wanted
    wanted=$(missing)
    [ -n "$wanted" ] || return 0
    local become=()
    if [ "$(id -u)" != 0 ]; then
        become=(sudo -n)
        sudo -n true 2>/dev/null || {
            echo "Missing packages. Run this, then try again:" >&2
            echo "  sudo apt-get install --no-install-recommends" $wanted >&2
            exit 1
        }
    fi
    "${become[@]}" apt-get update
    # shellcheck disable=SC2086 # a list of words
    "${become[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $wanted
}

installed() {
    "$PYTHON" -c "import sys; from importlib.metadata import version; sys.exit(version('kp') != '$VERSION')" 2>/dev/null
}

build() {
    "$PYTHON" -m pip install --disable-pip-version-check numpy pybind11
    # VIRTUAL_ENV: cmake finds this Python, not another. INSTALL, BUILT_IN: Debian's libraries in place of downloads.
    # DEBUG_LAYERS: or validation is on wherever it is installed. FMT_HEADER_ONLY: no dependency on a version of libfmt.
    VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH \
        pybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir) \
        KOMPUTE_OPT_INSTALL=OFF \
        KOMPUTE_OPT_USE_BUILT_IN_FMT=OFF \
        KOMPUTE_OPT_USE_BUILT_IN_PYBIND11=OFF \
        KOMPUTE_OPT_USE_BUILT_IN_VULKAN_HEADER=OFF \
        KOMPUTE_OPT_DISABLE_VULKAN_VERSION_CHECK=ON \
        KOMPUTE_OPT_DISABLE_VK_DEBUG_LAYERS=ON \
        CXXFLAGS=-DFMT_HEADER_ONLY=1 \
        LDFLAGS=-Wl,--as-needed \
        "$PYTHON" -m pip install --disable-pip-version-check --no-deps "kp==$VERSION"
}

install_packages
installed || build
"$PYTHON" -c "import kp" && echo "kp $VERSION is installed in $VENV"
