# Targets run in .venv, which they create from BASE_PYTHON with the pinned versions of requirements/; AdapterHub's tests,
# those of the oldest libraries and the docs' pages in environments of their own.
# PYTHON=... takes that interpreter as it is instead: no venv, nothing installed, no network.

VENV := .venv
ADAPTERHUB_VENV := .venv-adapterhub
OLDEST_VENV := .venv-oldest
NEWEST_VENV := .venv-newest
DOCS_VENV := .venv-docs
BASE_PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
# The package has no __main__; its binary need not be on PATH.
CLANG_FORMAT = $(PYTHON) -c 'from clang_format import clang_format; clang_format()'

ifeq ($(origin PYTHON),undefined)
  PYTHON := $(VENV)/bin/python
  VENV_STAMP := $(VENV)/.stamp
  ADAPTERHUB_PYTHON := $(ADAPTERHUB_VENV)/bin/python
  ADAPTERHUB_STAMP := $(ADAPTERHUB_VENV)/.stamp
  OLDEST_PYTHON := $(OLDEST_VENV)/bin/python
  OLDEST_STAMP := $(OLDEST_VENV)/.stamp
  NEWEST_PYTHON := $(NEWEST_VENV)/bin/python
  NEWEST_STAMP := $(NEWEST_VENV)/.stamp
  DOCS_PYTHON := $(DOCS_VENV)/bin/python
  DOCS_STAMP := $(DOCS_VENV)/.stamp
  GPU_PYTHON := $(BASE_PYTHON)
else
  VENV_STAMP :=
  ADAPTERHUB_PYTHON := $(PYTHON)
  ADAPTERHUB_STAMP :=
  OLDEST_PYTHON := $(PYTHON)
  OLDEST_STAMP :=
  NEWEST_PYTHON := $(PYTHON)
  NEWEST_STAMP :=
  DOCS_PYTHON := $(PYTHON)
  DOCS_STAMP :=
  GPU_PYTHON := $(PYTHON)
endif

# $(value ...): a variable's text as it stands, of which make runs nothing.
NVCC := $(if $(value CUDA_HOME),$(wildcard $(value CUDA_HOME)/bin/nvcc),$(shell command -v nvcc))
CSRC := $(shell find csrc -type f)
EMULATOR := $(shell find tests/simt -name '*.h' -o -name '*.cuh') $(wildcard tests/witness/*.h tests/witness/*.cpp)
# Where a compiler is, a failure to compile must be seen; elsewhere the package works without the extension.
ifneq ($(NVCC),)
ifeq ($(filter 1,$(value PEFT_KERNELS_NO_CUDA) $(value PEFT_KERNELS_NO_EXTENSION)),)
  export PEFT_KERNELS_REQUIRE_CUDA := 1
endif
endif

# The stamp's name holds what the built file depends on besides the sources, so that a change of it builds again.
depends = $(1) $(NVCC) $(value CXX) $(value PEFT_KERNELS_CUDA_ARCHS) $(value PEFT_KERNELS_NO_CUDA) $(value PEFT_KERNELS_NO_EXTENSION)
stamp_for = build/extension-$(shell echo '$(subst ','\'',$(depends))' | cksum | cut -d' ' -f1).stamp
STAMP := $(call stamp_for,$(PYTHON))
GPU_STAMP := $(call stamp_for,$(GPU_PYTHON))

define build_extension
	$(1) setup.py build_ext --inplace
	@rm -f build/extension-*.stamp && mkdir -p build && touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help venv build test quick thorough test-adapterhub test-oldest test-newest codegen lint format docs demo bench report \
  gpu gpu-first gpu-tests gpu-bench gpu-sanitize gpu-cache clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## venv     create or update .venv
venv: $(VENV)/.stamp

DEVELOPMENT := requirements/torch.txt requirements/dev.txt requirements/constraints.txt

# $(1): the environment's folder; $(2): what is installed at last, and without its requirements.
define install_development
	test -x $(1)/bin/python || $(BASE_PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet -r requirements/torch.txt
	$(1)/bin/python -m pip install --quiet -r requirements/dev.txt -c requirements/constraints.txt
	$(1)/bin/python -m pip install --quiet --no-deps -r $(2)
	touch $@
endef

$(VENV)/.stamp: $(DEVELOPMENT) requirements/no-deps.txt
	$(call install_development,$(VENV),requirements/no-deps.txt)

$(NEWEST_VENV)/.stamp: $(DEVELOPMENT) requirements/newest.txt
	$(call install_development,$(NEWEST_VENV),requirements/newest.txt)

$(ADAPTERHUB_VENV)/.stamp: requirements/torch.txt requirements/adapterhub.txt requirements/adapterhub-constraints.txt
	test -x $(ADAPTERHUB_VENV)/bin/python || $(BASE_PYTHON) -m venv $(ADAPTERHUB_VENV)
	$(ADAPTERHUB_VENV)/bin/python -m pip install --quiet -r requirements/torch.txt -c requirements/adapterhub-constraints.txt
	$(ADAPTERHUB_VENV)/bin/python -m pip install --quiet -r requirements/adapterhub.txt -c requirements/adapterhub-constraints.txt
	touch $@

$(OLDEST_VENV)/.stamp: requirements/torch.txt requirements/oldest.txt requirements/oldest-constraints.txt
	test -x $(OLDEST_VENV)/bin/python || $(BASE_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r requirements/torch.txt -c requirements/oldest-constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r requirements/oldest.txt -c requirements/oldest-constraints.txt
	touch $@

$(DOCS_VENV)/.stamp: requirements/docs.txt
	test -x $(DOCS_VENV)/bin/python || $(BASE_PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet -r requirements/docs.txt
	touch $@

## build    compile the extension in place: with CUDA where there is an nvcc; else what a CPU runs, and a record why
build: $(STAMP)

$(STAMP): setup.py setup_ninja.py pyproject.toml $(CSRC) $(VENV_STAMP)
	$(call build_extension,$(PYTHON))

## test     run the tests; skipped ones are listed with their reasons
test: build
	$(PYTHON) -m pytest tests -n $(WORKERS) --dist worksteal -m "not thorough" $(PYTEST_ARGS)

## thorough run what takes minutes and says again, in more cases, what test says: faults in device code, witnesses, sweeps
thorough: build
	$(PYTHON) -m pytest tests -n $(WORKERS) --dist worksteal -m thorough $(PYTEST_ARGS)

# Without compiles, the emulator, inductor, the demo, the benchmarks and what starts other processes; Triton's interpreter
# takes long, and the exact tests of one path say most. What is left says within minutes whether the code still works.
NOT_QUICK := compile or compiled or compiles or inductor or absent or another_process \
  or triton and (budget or runs or exact and (cublas or split))
NOT_QUICK_PATHS := $(foreach path,benchmarks codegen examples on_gpu simt soak core/test_slices.py,--ignore=tests/$(path)) \
  $(foreach name,adapter/test_csrc adapter/test_cuda lora/test_csrc lora/test_cuda,--ignore-glob='*/$(name)*')

## quick    run the tests that take no more than seconds each
quick: build
	$(PYTHON) -m pytest tests -n $(WORKERS) --dist worksteal -m "not slow and not thorough" -k "not ($(NOT_QUICK))" $(NOT_QUICK_PATHS) $(PYTEST_ARGS)

## test-adapterhub  run the tests that need AdapterHub, in .venv-adapterhub, which it creates
test-adapterhub: $(ADAPTERHUB_STAMP)
	@$(ADAPTERHUB_PYTHON) -c 'import adapters' # without it the tests would be skipped
	$(ADAPTERHUB_PYTHON) -m pytest tests/adapterhub $(PYTEST_ARGS)

# Left out is what an older release does otherwise by itself: PEFT below 0.21 fails where it deletes an adapter of prefixes
# or prompts.
OLDEST_TESTS := $(foreach name,from_peft peft_dora peft_layers peft_prompts prefix_model prompt_model trainer versions,\
  tests/integrations/test_$(name).py) tests/lora/test_peft_parity.py

## test-oldest  run tests of the integrations with the oldest PEFT and transformers, in .venv-oldest, which it creates
test-oldest: $(OLDEST_STAMP)
	@$(OLDEST_PYTHON) -c 'import peft, transformers; from peft_kernels.integrations.versions import OLDEST as o; \
	  assert all(m.__version__.startswith(o[m.__name__]) for m in (peft, transformers)), "these are not the oldest"'
	$(OLDEST_PYTHON) -m pytest $(OLDEST_TESTS) -n $(WORKERS) -k "not several_adapters" $(PYTEST_ARGS)

# Left out is what compares with PEFT where PEFT itself errs beside a cache that has another name: generation, and
# prefixes of models without a head for tokens.
NEWEST_TESTS := $(foreach name,prefix_architectures prefix_attention_source prefix_caches prefix_masks prefix_model \
  prompt_model trainer versions,tests/integrations/test_$(name).py)

## test-newest  run tests of prefixes and prompts with a transformers newer than that of test, in .venv-newest
test-newest: $(NEWEST_STAMP)
	@$(NEWEST_PYTHON) -c 'import transformers, pathlib; \
	  assert f"transformers=={transformers.__version__}\n" in pathlib.Path("requirements/newest.txt").read_text()'
	$(NEWEST_PYTHON) -m pytest $(NEWEST_TESTS) -n $(WORKERS) \
	  -k "not (test_generation or hand_on_no_keywords or test_is_pefts and not CAUSAL_LM)" $(PYTEST_ARGS)

## codegen  compile every kernel ahead of time for every architecture, and read the machine code; test takes a part
codegen: build
	PEFT_KERNELS_CODEGEN=all $(PYTHON) -m pytest tests/codegen -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

## lint     check style and types
lint: $(VENV_STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CSRC) $(EMULATOR)
	$(PYTHON) -m mypy peft_kernels python_ref

## format   apply the style
format: $(VENV_STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC) $(EMULATOR)

## docs     make the pages of docs/ and of the docstrings in build/docs; what cannot be resolved is an error
docs: $(DOCS_STAMP)
	$(DOCS_PYTHON) -m mkdocs build --quiet

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
$(GPU_STAMP): setup.py setup_ninja.py pyproject.toml $(CSRC)
	$(call build_extension,$(GPU_PYTHON))
endif

# Of one call: what a machine that is lent for ten minutes has time for. `make gpu` takes what it takes.
BUDGET_S ?= 540
GPU_RECORDS ?= benchmarks/results
# Triton's compiled kernels, or GPU_CACHE.tar.xz of them, brought from a machine where gpu-cache made them.
GPU_CACHE ?= build/triton-cache
on_gpu = $(GPU_PYTHON) -m tests.on_gpu
gpu_options = --out $(GPU_RECORDS) --cache $(GPU_CACHE)

## gpu      on a machine with a GPU: build, test and benchmark with PYTHON (else python3) as it is, without a network
gpu:
	$(on_gpu) all $(gpu_options)

## gpu-first  what a GPU should be asked first, in BUDGET_S seconds; run again, it goes on where it stopped
gpu-first:
	$(on_gpu) first $(gpu_options) --budget-s $(BUDGET_S)

## gpu-tests, gpu-bench  all tests, all benchmarks, likewise in slices
gpu-tests: $(GPU_STAMP)
	PYTEST_ADDOPTS="$(PYTEST_ARGS)" $(on_gpu) tests $(gpu_options) --budget-s $(BUDGET_S)

gpu-bench: $(GPU_STAMP)
	$(on_gpu) bench $(gpu_options) --budget-s $(BUDGET_S)

## gpu-sanitize  a few launches of every kernel under compute-sanitizer, where that is installed
gpu-sanitize: $(GPU_STAMP)
	$(on_gpu) sanitize $(gpu_options)

## gpu-cache  without a GPU: compile what tests and quick benchmarks will ask for, by PYTHON's Triton, into GPU_CACHE
gpu-cache:
	$(GPU_PYTHON) -m tests.on_gpu.cache make --cache $(GPU_CACHE) --workers $(WORKERS)

## clean    remove what was built; the venvs stay
clean:
	rm -rf build dist *.egg-info peft_kernels/_C*.so peft_kernels/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
