# `make demo` and `make test` need python3 >= 3.11 and nothing else: the rest is set up in .venv when it is missing or old.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu check format bench stress hammer chaos soak fuzz clean

help:
	@echo "make demo       serve a small MoE model, rebalance it live, and prove that nothing it computes changed"
	@echo "make test       the tests, without those marked slow"
	@echo "make test-slow  the slow ones"
	@echo "make test-gpu   the tests that need one or two NVIDIA GPUs (skipped without)"
	@echo "make check      ruff, mypy, import rules, size and naming rules"
	@echo "make format     let ruff rewrite what it can"
	@echo "make bench      all benchmarks"
	@echo "make stress     kill 100 daemons while ranks serve (3 minutes)"
	@echo "make hammer     10 million publications against readers at full speed (1 minute)"
	@echo "make chaos      1,000 random faults while ranks serve, everything checked after each (30 minutes or more)"
	@echo "make soak       serve at a high step rate and see that nothing grows (1 hour)"
	@echo "make fuzz       a million damaged inputs for each of four decoders (30 minutes)"
	@echo "make clean      remove caches and build outputs (not $(VENV))"

setup: $(STAMP)

# The stamp is written last: an install that was interrupted is done again, one that is complete is not looked at.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "== setting up $(VENV) (once; torch is large) =="
	@$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "== $(VENV) is ready =="

demo: $(STAMP)
	@$(VENV)/bin/eplb-async demo

test: $(STAMP)
	@$(PY) -m pytest

test-slow: $(STAMP)
	@$(PY) -m pytest -m slow --timeout 3600

# What needs GPUs, and the tests of whole rank groups once more with their tensors on them. PY may be another python with torch for CUDA.
test-gpu:
	@$(PY) -m pytest -m "gpu or multi_gpu" --timeout 400 tests
	@EPLB_TEST_DEVICE=cuda $(PY) -m pytest --timeout 400 tests/rank/test_plans.py tests/rank/test_faults.py tests/faults/test_faults.py

check: $(STAMP)
	@PYTHON=$(PY) scripts/check

format: $(STAMP)
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

bench: $(STAMP)
	@for file in benchmarks/bench_*.py; do echo "== $$file =="; $(PY) -m benchmarks.$$(basename $$file .py); done

stress: $(STAMP)
	@$(PY) scripts/stress

hammer: $(STAMP)
	@$(PY) scripts/hammer --publications 10000000

chaos: $(STAMP)
	@$(PY) scripts/chaos

soak: $(STAMP)
	@$(PY) scripts/soak

fuzz: $(STAMP)
	@for target in control plan settings traces; do $(PY) scripts/fuzz --target $$target || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
