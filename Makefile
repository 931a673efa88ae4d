# make demo   a whole release: real models trained on the spot, published to the embedded Hub, the card open to look at
# make test   formatting, lint, types and tests
#
# Both set everything up by themselves in .venv; nothing else has to be installed but Python 3.11 or newer and make.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-slow lint types clean

help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(READY)

# torch comes first and alone: a plain `torch` among other requirements would fetch the newest build with its CUDA
# packages. TORCH= chooses another one, such as the CUDA build of your system.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hubforge needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/hubforge lab .lab
	$(BIN)/hubforge publish recipes/demo.yaml --to local

test: $(READY) lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not network'

test-slow: $(READY)
	$(BIN)/python -m pytest -m 'slow and not network'

lint: $(READY)
	$(BIN)/ruff format --check hubforge tests bench
	$(BIN)/ruff check hubforge tests bench

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf .hubforge .lab .pytest_cache .mypy_cache .ruff_cache
