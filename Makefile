# make quickstart   sets up and runs the whole path on the embedded model and sample, then says where the report is
# make test         sets up and passes lint, types, import contracts and tests
#
# Both need only Python 3.11 (or newer) and make. PYTHON=... chooses the interpreter, TORCH=... the build of torch: a
# plain torch from PyPI brings CUDA on Linux, so point pip at the CPU index of your choice if you want the small one.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint setup setup-dev clean

quickstart: setup
	$(BIN)/gorgon quickstart

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup

lint: setup-dev
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

setup: $(VENV)/.installed

setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Gorgon needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
