# Every target builds .venv when it is missing or older than pyproject.toml and constraints.txt.
# Pass options with ARGS: make sweep ARGS="--space cifar/constraint_sweep --dry-run"

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := test,dev,search
# Tests that start no Ray run side by side, a file in one process; JOBS=0 runs them one after another.
JOBS := logical
SIDE_BY_SIDE := -n $(JOBS) --maxprocesses 4 --dist loadfile
ARGS :=

.PHONY: help venv sweep test test-all test-gpu soak lint format bench bench-text

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

sweep: $(STAMP) ## run a sweep: with no ARGS a small real one on this machine
	$(PYTHON) launch/sweep.py $(ARGS)

test: $(STAMP) ## the fast tests, under 90 s on 2 cores
	$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "not slow and not ray and not gpu and not soak" $(ARGS)

test-all: $(STAMP) ## every test that a machine without a GPU can run, except the soak tests
	@first=0; second=0; \
	$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "not ray and not gpu and not soak" $(ARGS) || first=$$?; \
	$(PYTHON) -m pytest -m "ray and not gpu and not soak" $(ARGS) || second=$$?; \
	if [ $$first$$second = 05 ] || [ $$first$$second = 50 ]; then exit 0; fi; exit $$(( first ? first : second ))

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m "gpu" $(ARGS)

soak: $(STAMP) ## the tests that run for many minutes
	$(PYTHON) -m pytest -m "soak and not gpu" $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(STAMP) ## let ruff format the code and mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(STAMP) ## measure the figures of the README, on this machine
	$(PYTHON) -m tests.benchmarks.run $(ARGS)

bench-text: $(STAMP) ## the table of language models: ARGS="authors", or ARGS="tofu /path/to/tofu"
	$(PYTHON) -m tests.benchmarks.bench_text $(ARGS)

venv: $(STAMP) ## build .venv

# The install goes through uv, which is on PATH or else comes into the venv first.
# Bytecode is compiled here: every Ray worker is a new process, and without it each one compiles torch and
# transformers anew in memory where PYTHONDONTWRITEBYTECODE is set.
$(STAMP): pyproject.toml constraints.txt
	@set -euo pipefail; unset PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME; \
	in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	uv_works() { command -v uv >/dev/null && uv --version >/dev/null 2>&1; }; \
	if [ -e $(VENV) ] && ! $(PYTHON) -c "$$in_range" 2>/dev/null; then \
		echo "error: $(VENV) has no working Python 3.11-3.13; remove it and run make again" >&2; exit 2; \
	fi; \
	if [ ! -e $(VENV) ]; then \
		if uv_works; then \
			uv venv --python '>=3.11,<3.14' $(VENV); \
		else \
			found=; \
			for name in python3.11 python3.12 python3.13 python3 python; do \
				if "$$name" -c "import ensurepip, venv; $$in_range" 2>/dev/null; then found=$$name; break; fi; \
			done; \
			if [ -z "$$found" ]; then \
				echo "error: no Python 3.11, 3.12 or 3.13 with the venv module on PATH; install one, or uv" >&2; exit 2; \
			fi; \
			"$$found" -m venv $(VENV); \
		fi; \
	fi; \
	if uv_works; then \
		uv=uv; \
	else \
		$(PYTHON) -m uv --version >/dev/null 2>&1 || \
			{ $(PYTHON) -m ensurepip >/dev/null && $(PYTHON) -m pip install --quiet uv; }; \
		uv="$(PYTHON) -m uv"; \
	fi; \
	$$uv pip install --python $(PYTHON) --compile-bytecode --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	touch $@
