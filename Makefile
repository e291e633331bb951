# Every target makes its own virtual environment (.venv) and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: run test check mutants bench wheel clean

run: .venv/.runtime  ## ask the default model a question; the worker sees noise (masked, the default)
	$(BIN)/tsqp generate "What is the capital of France?" --max-tokens 64 --stats

test: .venv/.dev  ## the test suite
	$(BIN)/pytest

check: .venv/.dev  ## the one gate: lint, format, types, import contracts, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

mutants: .venv/.dev  ## change one small thing of the guard after another; docs/audit.md explains what no test notices
	$(BIN)/python scripts/mutate_guard.py

bench: .venv/.dev  ## measure everything, into benchmarks/results/, and write the README's table and plots from it
	$(BIN)/tsqp bench all
	$(BIN)/tsqp bench private --mode masked_drained --tokens 16 --steps 256 --runs 3 --results benchmarks/results
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.readme

wheel: .venv/.dev
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv dist build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@ .venv/.runtime
