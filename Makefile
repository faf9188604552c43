# make         set up .venv and say what comes next
# make demo    fine-tune a small real model here, see before and after
# make test    checks and tests     make check   the checks alone
# make docs    the pages as a site, in build/site
# make soak    the loops of tests/soak for hours; Ctrl-C stops them, the next call goes on
# make bench   benchmarks/run.py         make gpu     benchmarks/gpu: all that a GPU can show, in 25 minutes
#
# PYTHON=python3.12 picks an interpreter, VENV=/some/where another virtual environment, JOBS=4 how many processes test
# (2 GB of memory each).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
# Where a machine writes no bytecode, each process would compile torch and transformers anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo test check lint types docs soak bench gpu clean

setup: $(VENV)/.ready
	@echo "Veneer is set up in $(VENV). Next:"
	@echo "  source $(VENV)/bin/activate    then: veneer"
	@echo "  make demo                    fine-tune a small real model, a few minutes"
	@echo "  make test                    checks and tests"

demo: $(VENV)/.ready
	$(BIN)/veneer demo

test: check
	$(BIN)/python -m pytest --durations 20 --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Side by side, since each takes one processor.
check: $(VENV)/.ready-dev
	@$(MAKE) --no-print-directory -j $(JOBS) types lint docs

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.ready-dev
	$(BIN)/mypy

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

soak: $(VENV)/.ready-soak
	$(BIN)/python -m tests.soak

bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/run.py

gpu: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/gpu

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info src/veneer/kernels/_native*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Veneer needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps: a second call installs nothing. What tests need includes what the demo needs.
NATIVE = setup.py $(wildcard src/veneer/kernels/native/*/*)

$(VENV)/.ready: pyproject.toml $(NATIVE) | $(BIN)/python
	@echo "Setting up $(VENV): PyTorch, transformers and the compiled kernels. This takes some minutes."
	$(BIN)/python -m pip install --editable . --no-compile
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(NATIVE) | $(BIN)/python
	@echo "Setting up $(VENV) with the tools for checks and tests. This takes some minutes."
	$(BIN)/python -m pip install --editable '.[dev]' --no-compile
	@touch $(VENV)/.ready $@

# 350 MB more, for loops that start clusters.
$(VENV)/.ready-soak: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev,ray]' --no-compile
	@touch $(VENV)/.ready $(VENV)/.ready-dev $@
