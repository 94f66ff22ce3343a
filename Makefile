# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= test,torch,examples,plot,docs
# Python compiles what it imports, which is a small part of what is installed.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable

.PHONY: demo test test-all fuzz lint bench docs clean

demo: .venv/demo
	$(BIN)/python examples/dense_equivalence.py $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: .venv/test
	$(BIN)/python tests/fuzz.py $(ARGS)

bench: .venv/test
	$(BIN)/python -m benchmarks $(ARGS)

docs: .venv/test
	$(BIN)/python docs/_site/as_notebook.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf .venv build dist site *.egg-info

.venv/pip:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: .venv/pip setup.cfg constraints.txt
	$(INSTALL) ".[examples]"
	touch $@

.venv/test: .venv/pip setup.cfg constraints.txt
	$(INSTALL) ".[$(EXTRAS)]"
	touch $@

.venv/dev: .venv/test
	$(INSTALL) ".[dev]"
	touch $@
