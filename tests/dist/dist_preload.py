"""Imported once by the fork server. Only imports: nothing here may start a thread or touch a process group."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.comm  # noqa: E402, F401
import deepspeed.moe.sharded_moe  # noqa: E402, F401
import megatron.core.tensor_parallel  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401

import ecdit_train.parallel.apply  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import torch._dynamo  # noqa: F401
