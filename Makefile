# Every target sets up what it needs in .venv, and again only after pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help test demo bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: $(VENV)/.with-test $(VENV)/.with-peers ## lint, types, import rules and the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal backends/flash_attn backends/flex backends/xformers plugins/natten
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal backends/triton/tests tests/inference/gpu tests/nn/gpu

demo: $(VENV)/.with-demo ## train a MaxViT on real digits, compare the backends, draw what it attends to
	$(BIN)/python examples/digits/demo.py

bench: $(VENV)/.with-bench $(VENV)/.with-peers ## measure this machine beside timm and torchvision, and rewrite docs/benchmarks
	for what in dispatch op model train scaling; do $(BIN)/maxattn bench $$what --out docs/benchmarks || exit 1; done

clean: ## remove .venv and everything that tools have built
	rm -rf $(VENV) build dist *.egg-info .hypothesis .*_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.with-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "maxattn needs Python 3.11 or newer, which '$(PYTHON)' is not: call make with PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.with-core: $(VENV)/.with-python pyproject.toml constraints.txt
	@echo "installing maxattn in $(VENV)"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.with-test $(VENV)/.with-demo: $(VENV)/.with-%: $(VENV)/.with-core
	@echo "installing what 'make $*' needs in $(VENV)"
	@$(PIP) -e '.[$*]'
	@touch $@

$(VENV)/.with-bench: $(VENV)/.with-core
	@echo "installing what 'make bench' draws plots with in $(VENV)"
	@$(PIP) -e '.[plot]'
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not (torch.version.cuda and torch.cuda.is_available()))'; then \
	  echo "installing the backends for its GPU in $(VENV)"; \
	  $(PIP) -e backends/triton -e backends/flex; \
	fi
	@touch $@

# torchvision is built for one build of torch and would bring another with it; the models need no more than its Python.
$(VENV)/.with-peers: $(VENV)/.with-core
	@echo "installing timm and torchvision, which the tests compare with, in $(VENV)"
	@$(PIP) --no-deps timm torchvision
	@$(PIP) huggingface_hub
	@touch $@
