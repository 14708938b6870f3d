# Two commands do all the set-up: `make demo` and `make test`. Everything lands in .venv and .cache of this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The torch to install where none is there yet. Its default wheel serves CPU and GPU alike.
TORCH ?= torch==2.13.0

.PHONY: demo test lint types tests clean

$(VENV)/installed: pyproject.toml setup.cfg .ci/constraints.txt $(wildcard arb_hf/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: lint types tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

tests: $(VENV)/installed
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .cache build dist *.egg-info arb_hf/_native*
