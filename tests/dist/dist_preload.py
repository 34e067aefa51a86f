"""Imported once by the fork server. Nothing here may start a thread or touch a process group."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.comm
import deepspeed.moe.sharded_moe  # noqa: F401
import megatron.core.tensor_parallel  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import ecdit_train.build  # noqa: F401
from ecdit_train.config.compose import compose

# Kept for all ranks (config/hydra_app.py): else each of them reads thirty YAML files anew.
compose(["experiment=shapes_tiny", "observe/sinks=none"], local=False)
