# `make` lists the targets. Set-up happens by itself, in .venv, and again only when a lock file or pyproject.toml changes.
# It installs exactly what requirements/*.lock pin where they hold (scripts/lock.py), elsewhere what pyproject.toml allows.

VENV := .venv
BIN := $(VENV)/bin

# A Python of one's own choice: `make test PYTHON=/opt/python3.12/bin/python3`.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif

# Where torch and torchvision come from, if not from the default index with its GPU libraries. Named at the first set-up.
TORCH_INDEX ?=
TORCH := $(shell sed -nE 's/^(torch(vision)?==[^ ]*) .*/\1/p' requirements/torch.lock)

# "yes" where the lock files hold. An environment that exists already decides, else the Python that will make it.
LOCKED := $(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON) false) scripts/lock.py --holds-here && echo yes)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input $(if $(CI),--quiet)
PIP_LOCKED := $(PIP) --require-hashes --no-deps --only-binary :all:

.DEFAULT_GOAL := help
.PHONY: help demo test check audit lock clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-7s %s\n", $$1, $$2 }'
	@echo 'A torch for CPUs only, 2.8 GB less to download: add TORCH_INDEX=https://download.pytorch.org/whl/cpu to the first command.'

demo: $(VENV)/.base ## set up, then label real images and show the result
	$(BIN)/resnet-batch demo

test: $(VENV)/.dev ## set up, then run the tests
	$(BIN)/python -m pytest

check: $(VENV)/.dev ## format, lint, types, import contract and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

audit: $(VENV)/.dev ## ask OSV about known vulnerabilities of the locked packages
	$(BIN)/python scripts/audit.py

lock: | $(BIN)/pip ## make the lock files anew from pyproject.toml (Linux x86-64, Python 3.11)
	$(BIN)/python scripts/lock.py

clean: ## remove the environment and everything else that was made
	rm -rf $(VENV) build demo-output dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# pip rather than python is the target: where a system lacks ensurepip, `python -m venv` fails and leaves a python behind.
$(BIN)/pip:
	$(if $(PYTHON),,$(error No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3))
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: requirements/torch.lock requirements/base.lock pyproject.toml | $(BIN)/pip
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) $(TORCH))
ifneq ($(LOCKED),)
	$(PIP_LOCKED) $(if $(TORCH_INDEX),,-r requirements/torch.lock) -r requirements/base.lock
	$(PIP) --no-deps --no-build-isolation --editable .
else
	$(PIP) --editable '.[cpu,demo]'
endif
	@touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.base
	$(if $(LOCKED),$(PIP_LOCKED) -r requirements/dev.lock,$(PIP) --editable '.[dev]')
	@touch $@
