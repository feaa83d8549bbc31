# The verbs of the project. CI calls the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: demo test check fix bench clean

demo: $(RUN_STAMP)  ## run the shipped model with an eighth of its experts on the device
	$(BIN)/expertflow run --prompt "The old house stood at the end of the lane, and" --slots 12.5% --max-tokens 120 --temperature 0.7 --seed 7

test: $(DEV_STAMP)  ## all tests
	$(BIN)/python -m pytest -n 2

check: $(DEV_STAMP)  ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(DEV_STAMP)  ## mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP)  ## the benchmark that suits this machine; result under benchmarks/results/
	$(BIN)/python benchmarks/host_execution.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(RUN_STAMP)

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
