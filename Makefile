# The only door. `make help` lists what is behind it.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { command -v $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ecdit-setup
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export WANDB_MODE ?= offline

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-faults test-slurm slurm-deps browser-deps pictures lint format golden docs bench bench-peers bench-data gpu-check image image-cpu image-digests clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## virtual environment with everything a CPU run and the tests need (about 4 minutes)

# Order matters: torch first (the constraint holds it), DeepSpeed built against that torch without its CUDA ops.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ecdit needs Python 3.11, 3.12 or 3.13 (set PYTHON=...)" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "ecdit needs a C compiler (cc)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0 numpy setuptools wheel packaging
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation deepspeed==0.19.8
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip check
	@touch $@

# Not ?=: the demo starts with `rm -rf $(RUN)`, and RUN may mean something else in your environment.
RUN := runs/demo
SHAPES := data/shapes_demo

# The main job on real input, in the commands a user would type. The first leg stops in the middle with exit code 75, "saved, run me
# again"; the second goes on from its checkpoint.
demo: export CUDA_VISIBLE_DEVICES :=
demo: setup  ## draw shapes into shards, train a small EC-DiT on 2 ranks, resume it once, draw, grade, report (about 6 minutes)
	rm -rf $(RUN)
	$(BIN)/ecdit data shapes out=$(SHAPES) count=8000 resolution=24 mix='{single_object: 1, colors: 4}' scale='[0.55,0.8]'
	$(BIN)/ecdit --nproc 2 train experiment=shapes_tiny run=$(RUN) data.shards=$(SHAPES) parallel=pair --stop-after 500 || test $$? -eq 75
	$(BIN)/ecdit --nproc 2 resume $(RUN)
	$(BIN)/ecdit --nproc 2 sample run=$(RUN) prompts='[a photo of a red circle, a photo of a blue square, a photo of a green triangle, a photo of a yellow cross]'
	$(BIN)/ecdit --nproc 2 evaluate run=$(RUN) tasks='[single_object,colors]' repeat=2
	$(BIN)/ecdit --nproc 2 allocation run=$(RUN)
	$(BIN)/ecdit report $(RUN)
	@echo
	@echo "Look at   $(RUN)/pictures/ (samples), $(RUN)/samples/ (the same prompts while it learned), $(RUN)/report.html (all of it)"
	@echo "Play      $(BIN)/ecdit play $(RUN)"
	@echo "Try next  $(BIN)/ecdit sample run=$(RUN) prompts='a photo of a purple square' sample.guidance=3 repeat=8"
	@echo "          $(BIN)/ecdit plan experiment=ec_dit_m_64e cluster=h100_ib400 cluster.nodes=8"

# Files of tests at a time; many tests start ranks of their own.
JOBS ?= 2

test: setup  ## the default test suite: everything but what takes minutes (40 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: setup  ## the slow suites: 8-rank grids, 512 fake ranks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile

test-faults: setup  ## the long fault drills: crash states, kills, stops, flips, disks (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

test-slurm: setup  ## all drills on a real Slurm cluster of namespaces, with an hour of faults at the end (needs root; about two hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m ''

slurm-deps:  ## install what the Slurm tests need, where root and apt-get are; elsewhere those tests skip
	tools/slurm_deps.sh

browser-deps:  ## install the browser that the tests of pages need, where root and apt-get are; elsewhere those tests skip
	tools/browser_deps.sh

pictures: setup  ## take the screenshots of docs/images anew; they show RUN (runs/demo) where it is there, else a made-up run
	ECDIT_PICTURES=$(CURDIR)/docs/images ECDIT_PICTURES_OF=$(wildcard $(abspath $(RUN))) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/pages

lint: setup  ## format check, lint, types, import rules, house rules, shell and Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/house.py
	$(BIN)/shellcheck .ci/run docker/*.sh tools/*.sh tests/golden/sbatch/*.sh
	$(BIN)/hadolint docker/Dockerfile

format: setup  ## rewrite the code the way `make lint` wants it
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/python tools/house.py --fix
	$(BIN)/ruff format .

golden: setup  ## rewrite the golden files; read the diff before you commit it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/golden --update-golden

docs: setup  ## rewrite the generated pages of docs/reference
	$(BIN)/python docs/generate.py

bench: setup  ## interleaved benchmarks against their bars; dated JSON under benchmarks/results/
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run

bench-peers: setup  ## public peers' own sparse layers beside ours: PEERS=folder of their clones (which, see benchmarks/peers.py)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peers $(or $(PEERS),$(error PEERS=folder is missing))

bench-data: setup  ## the data pipeline against peers, floors and its bars (about fifteen minutes); ENERGON=python of an environment with it
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.data $(if $(ENERGON),--energon $(ENERGON))

gpu-check: setup  ## everything that only a GPU can show (docs/how-to/first-hour-on-a-gpu.md); NPROC=n: the parity grid over n of them
	$(BIN)/python -m benchmarks.gpu $(if $(NPROC),--nproc $(NPROC))

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BUILDER ?= docker
BUILD = $(BUILDER) build -f docker/Dockerfile --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null)

image:  ## build the container image for GPU nodes (needs docker, or BUILDER=podman)
	$(BUILD) --build-arg KIND=gpu -t ecdit:$(VERSION) .

image-cpu:  ## the same for CPUs; PIP_EXTRA_INDEX_URL may name an index of CPU wheels of torch
	$(BUILD) --build-arg KIND=cpu --build-arg PIP_EXTRA_INDEX_URL='$(PIP_EXTRA_INDEX_URL)' -t ecdit:$(VERSION)-cpu .

image-digests:  ## hold the images' bases by what their tags name now (asks their registry); read the diff
	docker/digests.sh

clean:  ## remove the virtual environment and caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
