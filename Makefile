# Every target sets up what it needs from nothing. With a GPU: `make setup CONSTRAINTS=` (see CONTRIBUTING.md).

PYTHON      ?= python3
VENV        ?= .venv
VENV_FLAGS  ?=
CONSTRAINTS ?= constraints.txt
TORCH       ?=
EXTRAS      ?= dev
PYTEST_ARGS ?= -n 2
COMPARE_ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest version that each requirement of the package admits, torch excepted: the CPU pin stays.
LOWER := sed -nE '/^(dependencies|docs|ray|report|sweep|trl) = /,/^]/ s/^    "([A-Za-z-]+)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml | grep -v '^torch=='

.PHONY: setup test compare check docs format bench lower-bounds clean help
.DEFAULT_GOAL := help

help: ## Show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 26

setup: $(STAMP) ## Create .venv and install the package with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "PYTHON must be 3.10 or newer; give one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install $(addprefix -c ,$(CONSTRAINTS)) -e '.[$(EXTRAS)]' $(TORCH)
	@touch $@

test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)  # one thread for each of the workers

compare: $(STAMP) ## Run the main job; METHODS=loreft,qlora SEEDS=0,1 and COMPARE_ARGS='--model ...' are passed on
	$(BIN)/lowmem-reft compare $(if $(METHODS),--methods '$(METHODS)') $(if $(SEEDS),--seeds '$(SEEDS)') $(COMPARE_ARGS)

check: $(STAMP) ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## Build the documentation into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

format: $(STAMP) ## Apply the formatter and the fixes that are safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure the training step and the orthonormal map
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.orthonormal

lower-bounds: ## Run the tests with the oldest versions that pyproject.toml admits
	mkdir -p $(VENV)-lower
	$(LOWER) > $(VENV)-lower/bounds.txt
	$(MAKE) test VENV=$(VENV)-lower CONSTRAINTS='$(CONSTRAINTS) $(VENV)-lower/bounds.txt'

clean: ## Remove the environments and caches; results stay
	rm -rf $(VENV) $(VENV)-lower build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
