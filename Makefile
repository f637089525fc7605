# aat_hf: everything runs in .venv, made on first use.
#   make demo     a real model and a long text, dense and tiled side by side
#   make test     the test suite
#   make check    lint, types and tests
#   make vulkan   both Vulkan bindings, a software driver and what their tests need (Debian, Ubuntu)
# A particular build of torch:  make setup TORCH_ARGS="--index-url URL"

PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)
TORCH_PIN ?= torch==2.13.0
TORCH_ARGS ?=
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo doctor test lint types check vulkan shaders clean help

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# torch first and on its own: the pin settles its build before anything else can ask for another.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "aat_hf needs Python 3.10 to 3.13: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_ARGS) "$(TORCH_PIN)" || $(PIP) install $(TORCH_ARGS) torch
	$(PIP) install -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/aat demo $(ARGS)

doctor: $(STAMP)
	$(BIN)/aat doctor

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

vulkan: $(STAMP)
	$(PIP) install -e '.[vulkan]'
	scripts/build_kompute.sh $(VENV)

shaders: $(STAMP)
	$(BIN)/python -m aat_hf.vulkan.build_shaders

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find aat_hf tests -name __pycache__ -type d -prune -exec rm -rf {} +
