# make demo and make test work on a fresh machine: they create .venv and install everything they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types clean

help:  ## Show this help
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(READY)  ## Convert, quantize, verify and run the tiny checkpoint
	PATH="$(CURDIR)/$(BIN):$$PATH" bash fixtures/demo.sh

test: lint types  ## Run everything CI runs: lint, format check, types, tests
	$(BIN)/python -m pytest -q

lint: $(READY)  ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)  ## Format the sources and fix what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY)  ## Check types
	$(BIN)/mypy

clean:  ## Remove .venv and everything built or cached
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in by itself so that the build pip is configured for is settled before anything that depends on it;
# dependency groups need pip 25.1
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $(READY)
