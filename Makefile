# Everything runs in one virtual environment that the first call makes; later calls find it ready.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test more check zoo peers bench bench-scaling bench-gpu format clean

help:
	@echo "make demo    train a small net on real digits and write demo-out/report.html"
	@echo "make test    format check, lint, types and the whole test suite"
	@echo "make check   the quick part of it, under three minutes"
	@echo "make more    what make test samples from: every model of the zoo but the largest, in float32 too"
	@echo "make zoo     every model of the zoo, the large ones and float32 too, 500 random models and peak"
	@echo "             memory; writes docs/coverage.md"
	@echo "make peers   the environments that other libraries run in under make bench: 6 GB, once"
	@echo "make bench   perjac beside the other libraries that are there, in one run; writes"
	@echo "             docs/performance.md, as do the next two"
	@echo "make bench-scaling   cost against examples, rows, weights and positions"
	@echo "make bench-gpu       exported programs beside other libraries, on a GPU if JAX finds one"

demo: $(VENV)/.demo
	$(BIN)/perjac demo --out demo-out

test: lint
	$(BIN)/python -m pytest -n 2

more: lint
	$(BIN)/python -m pytest -n 2 -m "more and not large"

check: lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not more and not large"

zoo: lint
	$(BIN)/python -m pytest -n 2 -m "slow or more or large" tests/test_zoo.py tests/core/planning/test_memory_model.py \
	  tests/test_random_models.py

.PHONY: lint
lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

peers: $(VENV)/.test
	$(BIN)/python benchmarks/environments.py

RESULTS := benchmarks/results
# From what has been measured so far; a page without the peers' run would say nothing.
PAGE = test ! -e $(RESULTS)/latest.json || \
  $(BIN)/python benchmarks/report.py $(RESULTS)/latest.json --page docs/performance.md

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py --out $(RESULTS)
	$(PAGE)

bench-scaling: $(VENV)/.test
	$(BIN)/python benchmarks/scaling.py --out $(RESULTS)
	$(PAGE)

bench-gpu: $(VENV)/.test
	$(BIN)/python benchmarks/carry.py .bench/carried
	$(BIN)/python benchmarks/run.py --carried .bench/carried --limit 300 --out $(RESULTS)/carried
	$(PAGE)

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo-out

# Debian ships Python without ensurepip unless python3-venv is installed; virtualenv stands in there.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || (rm -rf $(VENV); \
	  $(PYTHON) -m pip install --quiet --user --break-system-packages virtualenv && \
	  $(PYTHON) -m virtualenv --quiet $(VENV))

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV): this takes a minute or two, once."
	$(PIP) install --editable ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV): this takes a minute or two, once."
	$(PIP) install --editable ".[test]"
	@touch $@ $(VENV)/.demo
