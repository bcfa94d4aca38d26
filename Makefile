# On a new machine: `make demo` and `make test` each set up .venv first; `make install` is that set-up alone.
# PYTHON is the interpreter that the environment is made from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# One thread per process: the models are small, and the tests run in two processes.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test lint docs clean

help:
	@echo "make install   .venv with pinned versions and all extras"
	@echo "make demo      three short trainings that go wrong, each with its report under runs/"
	@echo "make test      the whole test suite"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the tables of the documentation that follow from the code"
	@echo "make clean     remove .venv, caches and runs/"

install: $(STAMP)

# torch comes first, and pinned: nothing that follows can then pull another one in.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/lightning-spike demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/make_tables.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist runs
