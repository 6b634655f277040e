# Needs make and Python 3.11 or newer; everything else is installed into .venv, once.
# `make help` lists the commands.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# `make PYTHON=... TARGET` has an environment of its own, named after that Python's version.
VENV := .venv$(if $(PYTHON),-$(shell "$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
AUTHORS_INSTALLED := $(VENV)/.installed-authors
SITE_INSTALLED := $(VENV)/.installed-site
# Not quiet: the first installation takes minutes, and pip shows what it is at.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
EPOCHS := 10

.PHONY: help
help: ## List the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do \
		printf 'make %-9s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: $(INSTALLED) ## Train a classifier on two processes and draw what it learnt
	@$(BIN)/python docs/examples/digits.py \
		--strategy ddp --devices 2 --accelerator cpu --epochs $(EPOCHS) --out build/demo

.PHONY: test
test: lint ## Run every check: lint, types, import rules, tests, documentation
	$(BIN)/python -m pytest

.PHONY: whole
whole: $(INSTALLED) ## Run every case of the tests that `make test` only samples
	$(BIN)/python -m pytest --whole -m "sampled and not authors and not faults"

.PHONY: lint
lint: $(INSTALLED) ## Check style, formatting, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: $(INSTALLED) ## Run every code block of the documentation and check its links
	$(BIN)/python -m pytest tests/docs

.PHONY: support
support: $(INSTALLED) ## Run what differs most between Pythons and PyTorchs: checkpoints, strategies, the tutorial
	$(BIN)/python -m pytest tests/plugins/checkpoints tests/plugins/strategies \
		tests/docs/test_scripts_as_typed.py

.PHONY: site
site: $(SITE_INSTALLED) ## Build the site of the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.PHONY: mutants
mutants: $(INSTALLED) ## Prove the conformance kit: every mutant by every rule
	PYTHONPATH=tests/conformance $(BIN)/python -m proof.matrix

.PHONY: faults
faults: $(INSTALLED) ## Let ranks fail in every way, at every place, under every way of starting
	$(BIN)/python -m pytest -m faults tests/distributed/test_faults.py tests/distributed/test_many_launches.py tests/clusters

.PHONY: silence
silence: $(INSTALLED) ## Run every way round Fabric under every strategy, and resume runs that are killed
	$(BIN)/python -m pytest -m silence \
		tests/distributed/test_no_silent_wrong_training.py tests/distributed/test_resume_exactly.py

.PHONY: authors
authors: $(AUTHORS_INSTALLED) $(SITE_INSTALLED) ## Build, install and check the packages that authors start from and copy
	$(BIN)/python -m pytest -m authors tests/thirdparty tests/docs

.PHONY: generated
generated: $(INSTALLED) ## Prove the conformance kit: a sample of changes that nobody chose, another each time
	PYTHONPATH=tests/conformance $(BIN)/python -m proof.generated --sample 60 --minutes 8

.PHONY: mutations
mutations: $(INSTALLED) ## Prove the tests: find which run which lines, then change a sample of the code, another each time
	PYTHONPATH=tests/conformance $(BIN)/python -m proof.own --trace
	PYTHONPATH=tests/conformance $(BIN)/python -m proof.own --sample 30

.PHONY: seeds
seeds: $(INSTALLED) ## Prove the conformance kit: pairs of mutants and correct variants, over twenty seeds
	FABRIC_CONFORMANCE_SEEDS=20 $(BIN)/python -m pytest -q --whole tests/conformance/test_mutants.py tests/conformance/test_right.py

.PHONY: bench
bench: $(BENCH_INSTALLED) ## Compare speed with plain PyTorch and with the peers
	@shopt -s nullglob; scripts=(tests/benchmarks/bench_*.py); \
	if [ $${#scripts[@]} -eq 0 ]; then \
		echo "make bench: found no tests/benchmarks/bench_*.py to run; write one." >&2; exit 1; \
	fi; \
	for script in "$${scripts[@]}"; do echo "== $$script"; $(BIN)/python "$$script"; done

.PHONY: clean
clean: ## Remove the virtual environments, the caches and what the demo wrote
	rm -rf .venv .venv-* build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache \
		.pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python on the path that really runs and is new enough; `make PYTHON=...` names another.
$(BIN)/python:
	@found=; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "make: found no Python 3.11 or newer among:" \
			"$(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)." \
			"Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
		exit 1; \
	fi; \
	echo "Making the virtual environment $(VENV) with $$("$$found" --version)."; \
	"$$found" -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "make: $$found cannot make a virtual environment (its message is above)." \
			"On Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; \
	}

# The stamps say: installed since pyproject.toml and constraints.txt last changed. The pinned
# setuptools builds the project, so that a build downloads nothing of its own.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned dependencies into $(VENV), once: 1.6 GB with PyTorch's CPU build, 5.4 GB with its" \
		"CUDA build (README.md says how to choose). It takes minutes; pip says what it is at."
	@$(PIP_INSTALL) setuptools wheel
	@rm -rf fabric_registry.egg-info # what a build of a wheel left here would hide newer entry points
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev,test,examples]'
	@touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	@echo "Installing the peers to compare with into $(VENV)."
	@$(PIP_INSTALL) --no-build-isolation -e '.[bench]'
	@touch $@

$(AUTHORS_INSTALLED): $(INSTALLED)
	@echo "Installing what the example plugins stand on into $(VENV): DeepSpeed, Ray, bitsandbytes."
	@DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation -e '.[authors]'
	@touch $@

$(SITE_INSTALLED): $(INSTALLED)
	@echo "Installing what builds the site into $(VENV)."
	@$(PIP_INSTALL) --no-build-isolation -e '.[docs]'
	@touch $@
