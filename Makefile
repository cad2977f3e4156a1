# Everything a newcomer needs: `make demo` shows the main job, `make test` proves it. Both set up what they need.
.DEFAULT_GOAL := help
.PHONY: help setup demo test unit integration e2e check format docs constraints clean engine tools

VENV   := .venv
BIN    := $(VENV)/bin
# Test modules are spread over processes, long ones first; to watch one closely: make e2e SPREAD=
SPREAD ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(SPREAD)
# A package index with CPU builds of torch saves gigabytes where no GPU is: make demo TORCH_INDEX=URL
TORCH_INDEX ?=

help: ## Show this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Create .venv with zops and everything it needs for development

$(VENV)/.installed: pyproject.toml constraints.txt scripts/ensure-venv
	@TORCH_INDEX="$(TORCH_INDEX)" scripts/ensure-venv $(VENV)

demo: setup ## Run the main job with no engine, no GPU and no download: under 3 minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo

tools: ## Bring the programs that tests call and that are no Python packages
	@scripts/ensure-test-tools

engine: ## Bring up a Docker engine (installs it on Debian as root where it is missing)
	@scripts/ensure-engine
	@scripts/ensure-base-image

test: setup check tools engine ## Run every check and every test: unit, integration, e2e on a real engine
	@$(PYTEST) tests

unit: setup ## Run the unit tests only (seconds)
	@$(PYTEST) tests/unit

integration: setup tools ## Run the integration tests only
	@$(PYTEST) tests/integration

e2e: setup tools engine ## Run the end-to-end tests only
	@$(PYTEST) tests/e2e

check: setup ## Lint, format check, types, architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 3

format: setup ## Format the code and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## Generate the reference pages that are made from the code
	@$(BIN)/python scripts/generate_reference.py

constraints: ## Pin anew every dependency, from a fresh environment
	@scripts/pin-constraints

clean: ## Remove the environment, caches and what the demo left
	@rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
