# Targets run in .venv, which they create from BASE_PYTHON with the pinned versions of requirements/.
# PYTHON=... takes that interpreter as it is instead: no venv, nothing installed, no network.

VENV := .venv
BASE_PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
# The package has no __main__; its binary need not be on PATH.
CLANG_FORMAT = $(PYTHON) -c 'from clang_format import clang_format; clang_format()'

ifeq ($(origin PYTHON),undefined)
  PYTHON := $(VENV)/bin/python
  VENV_STAMP := $(VENV)/.stamp
  GPU_PYTHON := $(BASE_PYTHON)
else
  VENV_STAMP :=
  GPU_PYTHON := $(PYTHON)
endif

NVCC := $(if $(CUDA_HOME),$(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
CSRC := $(shell find csrc -type f)
# Where a compiler is, a failure to compile must be seen; elsewhere the package works without the extension.
ifneq ($(NVCC),)
ifneq ($(PEFT_KERNELS_NO_CUDA),1)
  export PEFT_KERNELS_REQUIRE_CUDA := 1
endif
endif

# The stamp's name holds what the built file depends on besides the sources, so that a change of it builds again.
stamp_for = build/extension-$(shell echo '$(1) $(NVCC) $(PEFT_KERNELS_CUDA_ARCHS) $(PEFT_KERNELS_NO_CUDA)' | cksum | cut -d' ' -f1).stamp
STAMP := $(call stamp_for,$(PYTHON))
GPU_STAMP := $(call stamp_for,$(GPU_PYTHON))

define build_extension
	$(1) setup.py build_ext --inplace
	@rm -f build/extension-*.stamp && mkdir -p build && touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help venv build test codegen lint format demo bench report gpu clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## venv     create or update .venv
venv: $(VENV)/.stamp

$(VENV)/.stamp: requirements/torch.txt requirements/dev.txt requirements/constraints.txt requirements/no-deps.txt
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements/torch.txt
	$(VENV)/bin/python -m pip install --quiet -r requirements/dev.txt -c requirements/constraints.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements/no-deps.txt
	touch $@

## build    compile the CUDA extension in place where there is an nvcc; elsewhere record why not
build: $(STAMP)

$(STAMP): setup.py pyproject.toml $(CSRC) $(VENV_STAMP)
	$(call build_extension,$(PYTHON))

## test     run the tests; skipped ones are listed with their reasons
test: build
	$(PYTHON) -m pytest tests -n $(WORKERS) $(PYTEST_ARGS)

## codegen  compile every kernel ahead of time for every architecture, and read the machine code; test takes a part
codegen: build
	PEFT_KERNELS_CODEGEN=all $(PYTHON) -m pytest tests/codegen -n $(WORKERS) $(PYTEST_ARGS)

## lint     check style and types
lint: $(VENV_STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CSRC)
	$(PYTHON) -m mypy peft_kernels python_ref

## format   apply the style
format: $(VENV_STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

## demo     finetune a small model on real data
demo: build
	$(PYTHON) -m examples.finetune

## bench    time every provider side by side
bench: build
	$(PYTHON) -m benchmarks

## report   write the README's tables, docs/benchmarks.md and docs/images from the recorded results
report: $(VENV_STAMP)
	$(PYTHON) -m benchmarks.report --images

ifneq ($(GPU_STAMP),$(STAMP))
$(GPU_STAMP): setup.py pyproject.toml $(CSRC)
	$(call build_extension,$(GPU_PYTHON))
endif

## gpu      on a machine with a GPU: build, test and benchmark with PYTHON (else python3) as it is, without a network
gpu: $(GPU_STAMP)
	$(GPU_PYTHON) -m pytest tests -m "not cpu_only" $(PYTEST_ARGS)
	$(GPU_PYTHON) -m benchmarks --out benchmarks/results

## clean    remove what was built; the venv stays
clean:
	rm -rf build dist *.egg-info peft_kernels/_C*.so peft_kernels/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
