# Every target sets up what it needs from nothing. With a GPU: `make setup CONSTRAINTS=lock.txt` (see CONTRIBUTING.md).

PYTHON      ?= python3
VENV        ?= .venv
VENV_FLAGS  ?=
CONSTRAINTS ?= constraints.txt lock.txt
TORCH       ?=
# For the newest versions: what to hold back, such as transformers<5.25.
HOLD        ?=
EXTRAS      ?= dev
PYTEST_ARGS ?= -n 2 --dist worksteal
# Without them two cells run at a time, with a thread each: the built-in base has no use for a second one.
COMPARE_ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS  := $(addprefix -c ,$(CONSTRAINTS))
# pip's constraints do not reach isolated builds, so what builds is installed first, and builds are not isolated.
# The lock is also for other torches than the pinned one: those before 2.13 want an older setuptools.
BACKENDS := hatchling editables 'setuptools<82'
# What torch chooses for itself, for its kind of device: in the lock it would only hinder another torch.
OF_TORCH := ^(torch|triton|nvidia-.*|cuda-.*)==
# The oldest version that each requirement of the package admits, torch excepted: the CPU pin stays.
LOWER := sed -nE '/^(dependencies|docs|eval|ray|report|sweep|trl|ui) = /,/^]/ s/^    "([A-Za-z0-9_-]+)>=([0-9.]+).*",$$/\1==\2/p' pyproject.toml | grep -v '^torch=='
# The requirements without their bounds; transformers, which moves fastest, is chosen before the others.
NAMES := echo transformers; sed -nE '/^(dependencies|dev) = /,/^]/ s/^    "([A-Za-z0-9_-]+)[^;"]*(;[^"]*)?",$$/\1\2/p' pyproject.toml
NEWEST := $(VENV)-newest

.PHONY: setup test faults compare check docs notebooks format bench lock lower-bounds newest contracts-newest newest-versions clean help
.DEFAULT_GOAL := help

help: ## Show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 26

setup: $(STAMP) ## Create .venv and install the package with its development tools

$(STAMP): pyproject.toml constraints.txt lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "PYTHON must be 3.10 or newer; give one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install $(PINS) $(BACKENDS)
	$(BIN)/python -m pip install $(PINS) --no-build-isolation -e '.[$(EXTRAS)]' $(patsubst %,'%',$(TORCH))
	@echo '$(CONSTRAINTS)' > $@  # tests/test_lock.py reads what the environment was made from

test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)  # one thread for each of the workers

faults: $(STAMP) ## Run the fault suite: runs killed anywhere, malformed inputs (see tests/faults)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'faults or not faults' tests/faults

compare: $(STAMP) ## Run the main job; METHODS=loreft,qlora SEEDS=0,1 and COMPARE_ARGS='--model ...' are passed on
	$(BIN)/lowmem-reft compare $(if $(METHODS),--methods '$(METHODS)') $(if $(SEEDS),--seeds '$(SEEDS)') $(or $(COMPARE_ARGS),--workers 2)

check: $(STAMP) ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP) ## Run the notebooks and keep what they print and draw
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebooks/execute.py

docs: $(STAMP) ## Build the documentation into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
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
	$(MAKE) test VENV=$(VENV)-lower CONSTRAINTS='$(filter-out lock.txt,$(CONSTRAINTS)) $(VENV)-lower/bounds.txt'

newest: newest-versions ## Run the tests with the newest versions there are, bounds or not; warnings are no errors
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -W default $(PYTEST_ARGS)

contracts-newest: newest-versions ## Run only what the package assumes of other libraries, with their newest versions
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -W default $(PYTEST_ARGS) tests/contracts || { echo \
		"A contract is broken by a version above: CONTRIBUTING.md, 'Versions', says how to go on." >&2; exit 1; }

newest-versions:
	$(PYTHON) -m venv --clear $(VENV_FLAGS) $(NEWEST)  # what is there already would pass for newest without a registry
	@($(NAMES)) > $(NEWEST)/names.txt
	@$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager \
		$(addprefix -c ,$(filter-out lock.txt,$(CONSTRAINTS))) -r $(NEWEST)/names.txt $(patsubst %,'%',$(TORCH) $(HOLD)) && \
		$(NEWEST)/bin/python -m pip install --no-deps -e . || \
		{ echo "The newest versions could not be installed, see above; nothing was tested with them." >&2; exit 1; }
	@$(NEWEST)/bin/python -m pip freeze | \
		grep -E '^(accelerate|bitsandbytes|datasets|lm_eval|peft|ray|torch|transformers|trl)=='

lock: ## Write lock.txt anew: the newest versions that pyproject.toml and constraints.txt admit, for each Python
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --upgrade uv
	printf '%s\n' $(BACKENDS) | $(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
		--extra dev --no-header --no-annotate -c constraints.txt pyproject.toml - -o $(VENV)-lock/all.txt
	{ grep '^#' lock.txt; grep -vE '$(OF_TORCH)' $(VENV)-lock/all.txt; } > $(VENV)-lock/lock.txt
	mv $(VENV)-lock/lock.txt lock.txt
	rm -rf $(VENV)-lock

clean: ## Remove the environments and caches; results stay
	rm -rf $(VENV) $(VENV)-lower $(NEWEST) $(VENV)-lock build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
