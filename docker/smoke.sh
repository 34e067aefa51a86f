#!/usr/bin/env bash
# What must work in an image before it is called one: every dependency can be imported, `ecdit` composes, and two steps are trained on
# the CPU. No GPU and no network; what needs a GPU is checked on a node by `make gpu-check`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline

python -W ignore - <<'PYTHON'
import importlib
import re
from importlib import metadata

import megatron.core  # its distribution's own name is a namespace

wanted = {re.match(r"[\w.-]+", line)[0] for line in metadata.requires("ecdit") if "extra ==" not in line} | {"ecdit"}
names = {re.sub(r"[-_.]+", "-", name).lower() for name in wanted}
found = {module: {d.lower().replace("_", "-") for d in of} & names for module, of in metadata.packages_distributions().items()}
assert set().union(*found.values()) == names, names - set().union(*found.values())
# The module of that name, or all that a distribution brings (duckdb also brings one for a package that it does not need).
for name in names:
    modules = [m for m, of in found.items() if name in of and not m.startswith("_") and m.isidentifier()]
    for module in [m for m in modules if m.lower() == name.replace("-", "_")] or modules:
        importlib.import_module(module)
PYTHON

ecdit --version
ecdit config show experiment=ec_dit_xl_8e >resolved.yaml
ecdit data shapes out=shapes count=64 resolution=24 mix='{single_object: 1}'
ecdit --nproc 2 train experiment=shapes_tiny parallel=pair run=run data.shards=shapes train.steps=2 optim.warmup_steps=1 \
  train.global_batch=16 train.microbatch=8 observe/sinks=none observe.sample_every=0
ecdit ckpt ls run
echo "smoke: this image works"
