# Every target makes what it needs: one virtual environment, redone when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: demo test test-slow lint format bench clean

demo: $(STAMP)  ## the whole job in a few minutes on a CPU; results in build/demo
	rm -rf build/demo
	$(BIN)/latentvae demo --out build/demo

test: $(STAMP)  ## what must pass before every commit
	$(BIN)/python -m pytest -q -n auto

test-slow: $(STAMP)  ## the slow tests and those that start several processes
	$(BIN)/python -m pytest -q -m "(slow or multiprocess) and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every script of benchmarks/, one after the other
	for script in benchmarks/*.py; do \
	  if [ -f "$$script" ]; then echo "== $$script"; $(BIN)/python "$$script"; fi; \
	done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 6 GB, since torch brings its CUDA libraries (they import on a CPU too)."
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable ".[demo,test,dev]" \
	  | awk '/^ *(Downloading|Using cached) / && !/metadata/ { print "  " $$1, $$2, $$3, $$4, $$5; fflush() } /^(Installing|Building|Successfully)/ { print "  " $$1, $$2, "..."; fflush() }'
	touch $(STAMP)
