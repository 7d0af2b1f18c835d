# Every target does its own set-up in .venv and says what it does. Needed beforehand: Python 3.11+ and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv demo docs attack zoo test test-cpus test-kernels explore check crosscheck bench bench-spine bench-modes bench-layers bench-compiled bench-accounting bench-distributed bench-choosing bench-models bench-correlated bench-better_learning bench-fashion clean

VENV := .venv
BENCH_VENV := .venv-bench
ZOO_VENV := .venv-zoo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(BENCH_VENV)/.installed
ZOO_STAMP := $(ZOO_VENV)/.installed
# The first interpreter that is new enough; PYTHON=... on the command line overrides it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# One process per core, one thread per process: the quickest way through many small tensors.
WORKERS ?= auto
PYTEST_ARGS ?=
# For zoo: parts of names of models, or of files of benchmarks/zoo/families; nothing for all. And options, such as --short.
ZOO ?=
# For test-cpus: --short, or the names of some of its choices.
CPUS ?=

help:
	@echo 'make demo        train on the digits with differential privacy, and show what it costs (about two minutes)'
	@echo 'make test        install what the tests need and run them all'
	@echo 'make attack      try to break the guarantee in over a hundred ways, and show what becomes of each (a minute)'
	@echo 'make zoo         compare some three hundred models with one example at a time; writes docs/zoo.md (an hour or more; ZOO="llama t5" for some)'
	@echo 'make test-cpus   the tests that touch numbers, as other processors run them (many minutes)'
	@echo 'make test-kernels  the kernels for GPUs, as Triton interprets them on a CPU (installs it in .venv-kernels)'
	@echo 'make explore     the tests again, on other random examples than the ones of every other run, and the deep ones (hours)'
	@echo 'make check       format, lint, types, documentation, tests'
	@echo 'make docs        build the documentation as pages to browse, into site/ (half a minute)'
	@echo 'make crosscheck  the accountants beside two public ones (installs those in .venv-crosscheck)'
	@echo 'make bench       all of the following, into benchmarks/results (hours; installs peers in environments of their own):'
	@echo '     bench-spine       whole steps beside non-private PyTorch and Opacus, time and memory'
	@echo '     bench-modes       every mode beside non-private PyTorch, time and memory'
	@echo '     bench-layers      single layers beside torch.nn and Opacus, time and memory (a quarter of an hour)'
	@echo '     bench-compiled    compiled steps, compile time included, beside compiled non-private PyTorch'
	@echo '     bench-accounting  how near an ε is and how long it takes, beside three other libraries (a quarter of an hour)'
	@echo '     bench-distributed steps on one process and on two, beside DistributedDataParallel (ten minutes)'
	@echo '     bench-choosing    what clip norm, learning rate, batch size and epochs do to accuracy (ten minutes)'
	@echo '     bench-models      models that people train, beside the same without privacy (a quarter of an hour)'
	@echo '     bench-fashion     Fashion-MNIST by sampling, noise, views and averages (two hours; wants the data set)'
	@echo '     bench-correlated  a step with correlated noise beside independent noise, time and memory (two minutes)'
	@echo '     bench-better_learning  what views, averages and the like bring at one epsilon (half an hour)'
	@echo 'make venv        only set up $(VENV)'
	@echo 'make clean       remove the environments and every cache'

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python' >&2; exit 1; }
	@echo '==> Setting up $(VENV) with $(PYTHON): torch and the rest of constraints.txt (minutes, the first time)'
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,docs,test]'
	@touch $@

demo: $(STAMP)
	@echo '==> Training on the handwritten digits under a privacy budget (examples/digits.py)'
	$(BIN)/python examples/digits.py

test: $(STAMP)
	@echo '==> Running every test'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

attack: $(STAMP)
	@echo '==> Attacking the guarantee (python -m attacks): a table, docs/attacks.md, and status 1 if anything is BROKEN'
	OMP_NUM_THREADS=1 $(BIN)/python -m attacks --out docs/attacks.md

# Without the needs of timm and torchvision, which would bring another build of torch: benchmarks/zoo/vision_ops.py makes do.
$(ZOO_STAMP): pyproject.toml constraints.txt benchmarks/zoo/constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python' >&2; exit 1; }
	@echo '==> Setting up $(ZOO_VENV) with the libraries whose models are tried'
	@test -x $(ZOO_VENV)/bin/python || "$(PYTHON)" -m venv $(ZOO_VENV)
	$(ZOO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/zoo/constraints.txt -e '.[huggingface]' peft diffusers torch_geometric opt_einsum
	$(ZOO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/zoo/constraints.txt --no-deps timm torchvision
	@touch $@

zoo: $(ZOO_STAMP)
	@echo '==> Comparing models with one example at a time (python -m benchmarks.zoo): benchmarks/results/zoo.json and docs/zoo.md'
	OMP_NUM_THREADS=1 $(ZOO_VENV)/bin/python -m benchmarks.zoo $(ZOO)

test-cpus: $(STAMP)
	@echo '==> Running the tests that touch numbers with the kernels of other processors (scripts/test_cpus.py)'
	$(BIN)/python scripts/test_cpus.py $(CPUS)

# Triton takes 700 MB, and is asked for by these tests alone.
test-kernels: $(STAMP)
	@echo '==> Running the kernels for GPUs on this CPU, beside their twins (tests/noise/test_chacha.py)'
	@test -d .venv-kernels/triton || $(BIN)/python -m pip install --quiet --disable-pip-version-check --target .venv-kernels --no-deps triton==3.7.1
	PYTHONPATH=.venv-kernels TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/noise/test_chacha.py $(PYTEST_ARGS)

explore: $(STAMP)
	@echo '==> Running every test on fresh random examples'
	HYPOTHESIS_PROFILE=explore OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m 'deep or not deep' $(PYTEST_ARGS)

docs: $(STAMP)
	@echo '==> Building the documentation (mkdocs.yml); open site/index.html'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check: $(STAMP)
	scripts/check

crosscheck:
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python' >&2; exit 1; }
	@echo '==> Comparing the accountants with dp-accounting and prv-accountant (scripts/crosscheck-accounting)'
	PYTHON="$(PYTHON)" scripts/crosscheck-accounting

$(BENCH_STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; install one, or pass PYTHON=/path/to/python' >&2; exit 1; }
	@echo '==> Setting up $(BENCH_VENV) with the library that the benchmark compares with'
	@test -x $(BENCH_VENV)/bin/python || "$(PYTHON)" -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/constraints.txt -e . opacus
	@touch $@

bench: bench-spine bench-modes bench-layers bench-compiled bench-accounting bench-distributed bench-choosing bench-models bench-correlated bench-better_learning

bench-spine: $(BENCH_STAMP)
	@echo '==> Timing whole steps: every network, batch size and library (benchmarks/spine.py, a long while)'
	$(BENCH_VENV)/bin/python -m benchmarks.spine --out benchmarks/results --again --note ''

bench-modes: $(BENCH_STAMP)
	@echo '==> Timing every mode on every network (benchmarks/modes.py)'
	$(BENCH_VENV)/bin/python -m benchmarks.modes --out benchmarks/results --again

bench-layers: $(BENCH_STAMP) $(STAMP)
	@echo '==> Timing single layers, batches 16 to 2048 (benchmarks/layers.py)'
	$(BENCH_VENV)/bin/python -m benchmarks.layers --out benchmarks/results --again --note ''
	$(BIN)/python -m benchmarks.layers --out benchmarks/results --plot

bench-compiled: $(BENCH_STAMP)
	@echo '==> Timing compiled steps, compilation included (benchmarks/compiled.py, up to an hour)'
	OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python -m benchmarks.compiled --out benchmarks/results --again

bench-distributed: $(STAMP)
	@echo '==> Timing steps on one process and on two (benchmarks/distributed.py)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.distributed --out benchmarks/results

bench-choosing: $(STAMP)
	@echo '==> Training on the digits with other and other numbers (benchmarks/choosing.py)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.choosing --out benchmarks/results

bench-models: $(STAMP)
	@echo '==> Timing private steps of known architectures (benchmarks/models.py)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.models --out benchmarks/results --threads 1

bench-fashion: $(STAMP)
	@echo '==> Training on Fashion-MNIST by several mechanisms (benchmarks/fashion.py)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fashion --out benchmarks/results

bench-correlated: $(STAMP)
	@echo '==> Timing steps with correlated noise (benchmarks/correlated.py)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.correlated --out benchmarks/results

bench-better_learning: $(STAMP)
	@echo '==> Comparing ways to learn better at one epsilon (benchmarks/better_learning.py)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.better_learning --out benchmarks/results

bench-accounting: $(STAMP) crosscheck
	@echo '==> Asking the accountants for ε beside three others, in .venv-crosscheck (benchmarks/accounting.py)'
	.venv-crosscheck/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/constraints.txt opacus
	$(BIN)/python -m benchmarks.accounting --out benchmarks/results --peers .venv-crosscheck/bin/python

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(ZOO_VENV) .venv-crosscheck .venv-kernels .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output site
