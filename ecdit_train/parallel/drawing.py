"""FSDP while pictures are drawn: many forward passes, no backward, weights that do not change.

In training a block's weights are gathered for its forward pass and freed again. A sampler would pay that in each of its
evaluations; here they are gathered once and stay, where they fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from .fsdp import reshard
from .runtime import Runtime

SHARE = 0.5
"""Of the memory that is free when drawing begins, what gathered weights may take; the rest is for activations, keys and values."""

METHODS = ("prompt", "keys_values")
"""Of `DiT` and `Block`: they use weights outside of `forward`."""


def gathered_bytes(model: nn.Module) -> int:
    """Of this rank's part (under tensor and expert parallelism) with all of FSDP's shards gathered, in the weights' own type:
    at most what will be gathered."""
    return sum(p.numel() * p.element_size() for p in model.parameters())  # a DTensor counts its whole


@contextmanager
def drawing(model: nn.Module, *, runtime: Runtime) -> Iterator[None]:
    """Weights stay gathered inside, and are given back at the end; what changed in the shards before is seen. All ranks enter.

    Memory: with every block gathered a rank holds its whole tp/ep-local model, in bf16 half of the bytes of the fp32 weights that
    are counted here. Where those are more than SHARE of what is free on any rank, gathering and freeing goes on as in training.
    """
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if not modules:
        yield
        return
    for module in modules:
        for name in METHODS:
            if hasattr(module, name) and name not in vars(module):  # registering puts a method into the instance
                register_fsdp_forward_method(module, name)
    reshard(model)
    (crowded,) = runtime.any_rank(not _fits(model, runtime.device))
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    before = [group.post_forward_mesh_info for group in groups]  # FSDP has a setter, and nothing that says what was set
    if not crowded:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, mesh_info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh_info
        reshard(model)


def _fits(model: nn.Module, device: torch.device) -> bool:
    """On the CPU always: its ranks are tests and demos."""
    return device.type != "cuda" or gathered_bytes(model) < SHARE * torch.cuda.mem_get_info(device)[0]
