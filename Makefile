# The only door. `make help` lists what is behind it.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { command -v $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ecdit-setup
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export WANDB_MODE ?= offline

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-dist lint format golden bench gpu-check image clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## virtual environment with everything a CPU run and the tests need (about 4 minutes)

# Order matters: torch first (the constraint holds it), DeepSpeed built against that torch without its CUDA ops.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ecdit needs Python 3.11 or 3.12 (set PYTHON=...)" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "ecdit needs a C compiler (cc)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0 numpy setuptools wheel packaging
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation deepspeed==0.19.8
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip check
	@touch $@

RUN ?= runs/demo
DEMO_DATA ?= data/shapes_demo
TORCHRUN := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2

# The main job on real input, in the commands a user would type. Exit code 75 of the first leg means "saved, run me again".
demo: setup  ## shapes into shards, train a small EC-DiT on 2 processes, resume it once, draw, grade, report (about 6 minutes)
	$(BIN)/python -m benchmarks.demo_banner start
	$(BIN)/ecdit data shapes out=$(DEMO_DATA) $(DEMO_SHAPES)
	rm -rf $(RUN)
	OMP_NUM_THREADS=1 $(TORCHRUN) -m ecdit_train.cli train experiment=shapes_tiny run=$(RUN) data.shards=$(DEMO_DATA)
