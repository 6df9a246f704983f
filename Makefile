# The commands a newcomer needs: make test, make demo; the rest serves development.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CC ?= cc

.PHONY: test demo lint reference reference-sanitize codegen bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,bench,lint]"
	touch $@

reference: ## the C oracle, as a shared library
	$(MAKE) -C csrc_reference CC=$(CC)

reference-sanitize: ## the C oracle's self-test under the address and undefined-behaviour sanitizers
	$(MAKE) -C csrc_reference CC=$(CC) sanitize

test: $(VENV)/.installed reference
	$(BIN)/python -m pytest --numprocesses 2

demo: $(VENV)/.installed
	$(BIN)/python -m bench.pretrain --preset demo --compare adamw gwt2 gwt3 --out runs/demo $(DEMO_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict gwt_kernels

codegen: $(VENV)/.installed ## machine code of every kernel variant, without a GPU
	$(BIN)/python -m bench.codegen

bench: $(VENV)/.installed
	$(BIN)/python -m bench.optimizers

clean:
	rm -rf $(VENV) build dist runs site
	$(MAKE) -C csrc_reference clean
