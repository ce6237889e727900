# make demo              train, extend and sample in miniature on this machine, with a small Wan;
#                        FAMILY=hunyuan or mochi for the others, ARGS="key=value ..." for settings
# make test              everything that runs on a CPU, but the slow tests
# make test-slow         the slow ones
# make test-gpu          the ones for an NVIDIA GPU; GPU_JOBS=1 where it has less memory than an H200
# make test-gpu2         the ones for two of them
# make experiment-tiny   benchmarks/extend.py in miniature: train, extend, sample, measure, report
# make check             ruff and pyright
#
# Each sets up first: a virtual environment in .venv with the versions of constraints.txt.
# Another interpreter: make PYTHON=python3.12. Another environment: make VENV=/path/to/venv.

PYTHON ?= python3
VENV ?= .venv
FAMILY ?= wan
GPU_JOBS ?= 4
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.longreel-setup

# One thread a worker: the tests are many small tensors, and two workers share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# What compiles kernels waits for a CPU more than for the GPU, so that some may share one.
PYTEST_GPU := OMP_NUM_THREADS=4 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help setup demo experiment-tiny test test-slow test-gpu test-gpu2 check clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

# torch comes first and alone, so that a CPU build from a local index is kept by what follows.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m longreel.launch.demo $(FAMILY) $(ARGS)

experiment-tiny: $(STAMP)
	$(BIN)/python benchmarks/extend.py scale=tiny out=runs/experiment-tiny seeds=0,1 $(ARGS)

test: $(STAMP)
	$(PYTEST) -q -n 2 $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -q -m slow $(ARGS)

test-gpu: $(STAMP)
	$(PYTEST_GPU) -n $(GPU_JOBS) -m "gpu and not large" $(ARGS)
	$(PYTEST_GPU) -m "gpu and large" $(ARGS)

test-gpu2: $(STAMP)
	$(PYTEST_GPU) -m gpu2 $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
