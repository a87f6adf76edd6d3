# `make demo` and `make test` each take a fresh machine to a result; CONTRIBUTING.md has the others.
# PYTHON chooses the interpreter (3.11 to 3.13), VENV the virtual environment they make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
SLOW_RULES := tests/patterns/test_algebra.py tests/patterns/test_sharing.py

.PHONY: demo test test-only fast lint

demo: $(VENV)/demo-installed
	$(BIN)/python benchmarks/demo.py

test: lint test-only

test-only: $(VENV)/test-installed
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/templates/interpreted

fast: $(VENV)/test-installed
	$(PYTEST) tests/patterns tests/test_imports.py tests/test_options.py $(SLOW_RULES:%=--ignore=%)

lint: $(VENV)/test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/test-installed: EXTRAS := test,lint
$(VENV)/demo-installed: EXTRAS := examples,benchmarks
$(VENV)/%-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
