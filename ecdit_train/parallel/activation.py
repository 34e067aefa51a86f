"""Activation checkpointing per block: none, selective (keep routing and what the expert exchange received), full.

The block's forward is replaced, not wrapped in another module, so parameter names stay those of the plain model.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ecdit_train.model.dit import DiT

from .expert_parallel import EXCHANGE

Mode = Literal["none", "selective", "full"]

_KEPT = {
    "aten::topk",
    EXCHANGE,
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::wait_tensor",
}
"""Results kept by `selective`. The exchange would cost traffic again (two all-to-alls per sparse layer); routing is small and must
not be decided twice: a recomputed logit that differs in its last bit may pick another token."""


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = isinstance(op, torch._ops.OpOverload) and op._schema.name in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(model: DiT, *, mode: Mode) -> None:
    """Recompute each block in backward, in place. The network draws no random numbers, so no generator state is kept."""
    if mode == "none":
        return
    extra: dict[str, Any] = {}
    if mode == "selective":
        extra["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **extra)
