# Octick. `make help` lists the targets; `make demo` and `make test` are all a newcomer needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: help demo test check lint format types imports clean reference bench-replay bench-memory bench-speed soak bench-trust fuzz-book

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }

# Without torch: the daemon, replay and the demo do not need it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# torch first and alone: the pinned CPU build, so that nothing else pulls another one.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[models,dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed ## Simulator, daemon and subscriber for 20 s, then a replay: one digest
	$(BIN)/octick demo

test: $(VENV)/.installed-dev ## Install what the tests need and run them all
	$(BIN)/octick compile
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: lint types imports test ## What CI runs: lint, format, types, imports, tests

lint: $(VENV)/.installed-dev ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## mypy
	$(BIN)/mypy

imports: $(VENV)/.installed-dev ## import-linter: imports go one way
	$(BIN)/lint-imports

reference: $(VENV)/.installed-dev ## Rebuild the reference model from the simulator
	$(BIN)/octick model reference --out models/reference

bench-replay: $(VENV)/.installed ## Book levels, messages and signals a second
	$(BIN)/octick bench replay

bench-memory: $(VENV)/.installed ## Resident memory over a replay of 10 million messages
	$(BIN)/octick bench memory

bench-speed: $(VENV)/.installed-dev ## Tick to signal, features, overload, start-up (6 min)
	$(BIN)/octick bench latency
	$(BIN)/octick bench features
	$(BIN)/octick bench overload
	$(BIN)/octick bench start

soak: $(VENV)/.installed-dev ## An hour of market time at twice the recorded peak: memory and tail must not grow
	$(BIN)/octick bench soak --hours 1

bench-trust: $(VENV)/.installed-dev ## Halts, the shadow's cost, a quiet day, drift, a day with a recalibration (40 min)
	$(BIN)/octick bench halt
	$(BIN)/octick bench shadow --rounds 9
	$(BIN)/octick bench quiet
	$(BIN)/octick bench drift
	$(BIN)/octick bench day

fuzz-book: $(VENV)/.installed-dev ## The book against a naive one, 10 million operations
	OCTICK_BOOK_OPERATIONS=10000000 $(BIN)/python -m pytest tests/engine/test_book.py -k naive

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
