# The verbs of the project. CI calls the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/.installed
TODAY := .venv-today
SOAK_MODELS := .soak-models
STEPS := 10000
SMOKE := -m pytest tests/test_families_smoke.py

.PHONY: demo test mutations soak check fix bench newest-smoke newest resolve clean

demo: $(RUN_STAMP)  ## run the shipped model with an eighth of its experts on the device
	$(BIN)/expertflow run --prompt "The old house stood at the end of the lane, and" --slots 12.5% --max-tokens 120 --temperature 0.7 --seed 7

test: $(DEV_STAMP)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

mutations: $(DEV_STAMP)  ## put small faults into a copy of the source and see the tests fail; minutes, by hand
	$(BIN)/python tools/mutations.py

soak: $(DEV_STAMP)  ## 10,000 random steps, formats drawn too, every logit compared; minutes, by hand
	rm -rf $(SOAK_MODELS)
	$(BIN)/python tests/write_models.py $(SOAK_MODELS)
	$(BIN)/python benchmarks/soak.py --models $(SOAK_MODELS) --steps $(STEPS)
	rm -rf $(SOAK_MODELS)

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

newest-smoke: $(NEWEST_STAMP)  ## every family with the newest transformers that the project allows
	$(NEWEST)/bin/python $(SMOKE)

newest:  ## every family with the newest transformers of today's index; by hand
	$(PYTHON) -m venv --clear $(TODAY)
	$(TODAY)/bin/python -m pip install --quiet --constraint constraints-newest.txt --editable '.[dev,serve]'
	$(TODAY)/bin/python -m pip install --upgrade transformers
	$(TODAY)/bin/python $(SMOKE)

resolve: | $(BIN)/python  ## resolve all pins against today's index, downloads half a gigabyte; by hand
	$(BIN)/python -m pip install --dry-run --ignore-installed --constraint constraints.txt '.[dev,serve,scale]'
	$(BIN)/python -m pip install --dry-run --ignore-installed --constraint constraints-newest.txt '.[dev,serve,scale]'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plot]'
	touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,serve]'
	touch $@ $(RUN_STAMP)

$(NEWEST_STAMP): pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints-newest.txt --editable '.[dev,serve]'
	touch $@

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(NEWEST) $(TODAY) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
