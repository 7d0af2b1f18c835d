# Every target does its own set-up in .venv and says what it does. Needed beforehand: Python 3.11+, make, a C compiler.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench clean

VENV := .venv
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(BENCH_VENV)/.installed
# The first interpreter that is new enough; PYTHON=... on the command line overrides it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# One process per core, one thread per process: the quickest way through many small tensors.
WORKERS ?= auto
PYTEST_ARGS ?=

help:
	@echo 'make demo    train on the digits with differential privacy, and show what it costs (about two minutes)'
	@echo 'make test    install what the tests need and run them all'
	@echo 'make check   format, lint, types, documentation, tests'
	@echo 'make bench   speed and memory beside non-private PyTorch and Opacus (installs the latter in $(BENCH_VENV))'
	@echo 'make venv    only set up $(VENV)'
	@echo 'make clean   remove the environments and every cache'

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python' >&2; exit 1; }
	@echo '==> Setting up $(VENV) with $(PYTHON): torch and the rest of constraints.txt (minutes, the first time)'
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,test]'
	@touch $@

demo: $(STAMP)
	@echo '==> Training on the handwritten digits under a privacy budget (examples/digits.py)'
	$(BIN)/python examples/digits.py

test: $(STAMP)
	@echo '==> Running every test'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

check: $(STAMP)
	scripts/check

$(BENCH_STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python' >&2; exit 1; }
	@echo '==> Setting up $(BENCH_VENV) with the library that the benchmark compares with'
	@test -x $(BENCH_VENV)/bin/python || "$(PYTHON)" -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/constraints.txt -e . opacus
	@touch $@

bench: $(BENCH_STAMP)
	@echo '==> Timing whole steps: every network, batch size and library (a long while)'
	$(BENCH_VENV)/bin/python -m benchmarks.spine --out benchmarks/results --again --note ''

clean:
	rm -rf $(VENV) $(BENCH_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output
