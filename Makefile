# Two commands take a fresh machine to a result: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.11 to 3.13), VENV the virtual environment they make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/demo-installed
	$(BIN)/python benchmarks/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/templates/interpreted

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
