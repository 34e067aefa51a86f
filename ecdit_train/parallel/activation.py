"""Activation checkpointing per block: none, selective (keep routing and what the exchanges received), full.

The block's forward is replaced, not wrapped in another module, so parameter names stay those of the plain model.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ecdit_train.model.dit import DiT
from ecdit_train.model.selecting import DECIDED

from .expert_parallel import EXCHANGE

Mode = Literal["none", "selective", "full"]

KEPT = frozenset(
    {
        "aten::topk",
        "aten::nonzero",
        "aten::sort",
        "aten::kthvalue",
        "aten::masked_select",
        DECIDED,
        EXCHANGE,
        "_c10d_functional::all_gather_into_tensor",
        "_c10d_functional::all_to_all_single",
        "_c10d_functional::all_reduce",
    }
)
"""Ops whose results `selective` keeps. An exchange would cost its traffic again (two all-to-alls per sparse layer);
routing is small and must not be decided twice: a recomputed logit that differs in its last bit may pick another token
(topk), or another number of them (nonzero); what a router decides by other means goes through `decided`. `wait_tensor`
must not be among them: a wait on a kept result returns at once, while one that compiled code issues for its own in-place
collective has to happen (without it inductor's blocks gave wrong gradients under tp)."""

Saved = dict[str, list[Any]]


class _Mode(TorchDispatchMode):
    """Our own pair of modes, because torch 2.13's (`create_selective_checkpoint_contexts`) demands
    that forward and recomputation dispatch the same ops one by one, and FSDP's hooks inside a
    block dispatch others (tests/dist/test_dist_quirks.py)."""

    def __init__(self, saved: Saved) -> None:
        super().__init__()
        self.saved = saved

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Keep(_Mode):
    """Forward: remember the results of KEPT, in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in KEPT:
            # Detached: the original will carry the graph, which must not live as long as what is saved.
            self.saved[name].append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
        return out


class _Replay(_Mode):
    """Recomputation: hand the results out again instead of running the op."""

    def __enter__(self) -> Any:
        self.used: dict[str, int] = defaultdict(int)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if name not in KEPT:
            return func(*args, **(kwargs or {}))
        index = self.used[name]
        self.used[name] += 1
        out, self.saved[name][index] = self.saved[name][index], None  # freed as backward goes on
        assert out is not None, f"{name}: a second backward through a checkpointed block"
        return out


def _name(func: Any) -> str:
    return func._schema.name if isinstance(func, torch._ops.OpOverload) else ""


def _contexts() -> tuple[_Keep, _Replay]:
    saved: Saved = defaultdict(list)
    return _Keep(saved), _Replay(saved)


def apply_activation_checkpointing(model: DiT, *, mode: Mode) -> None:
    """Recompute each block in backward, in place. The network draws no random numbers, so no
    generator state is kept."""
    if mode == "none":
        return
    extra: dict[str, Any] = {"context_fn": _contexts} if mode == "selective" else {}
    for block in model.blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **extra
        )
