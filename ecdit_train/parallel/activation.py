"""Activation checkpointing per block: none, selective, full; for all blocks or a share of them. What is kept: recompute.py.

A block's forward is replaced, not wrapped in another module, so parameter names stay those of the plain model. Checkpointing
goes around compiled code and sees the ops that are dispatched one by one: those of modules whose results are to be kept must
not be inside of a compiled graph (compiling.py leaves them out).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from ecdit_train.config.schema import Kept
from ecdit_train.model.block import Block
from ecdit_train.model.dit import DiT
from ecdit_train.model.moe import MoE

from .recompute import DECISIONS, EXCHANGES, PRODUCTS, UNREAD, checkpointed, kept_in_attention

Mode = Literal["none", "selective", "full"]

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Names of ops, while a module runs."""

    kept: frozenset[str] = NOTHING
    """Kept besides what the block keeps."""
    unread: frozenset[str] = NOTHING
    """They only feed a kept op: not run again, not kept either."""


_here: ContextVar[Scope] = ContextVar("scope of the module that is running", default=Scope())  # noqa: B039 - frozen


@dataclass(frozen=True, kw_only=True)
class _Unread:
    """Stands for a tensor whose values nobody will ask for."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device


COLLECTIVES_IN_PLACE = frozenset({"c10d::allreduce_", "c10d::allreduce_coalesced_", "c10d::broadcast_"})
"""Their schemas do not say that they write into what they are given."""

Saved = dict[str, list[Any]]
"""Results by op, in order; None once they were handed out."""


class _Mode(TorchDispatchMode):
    """Our own pair of modes, because torch 2.13's (`create_selective_checkpoint_contexts`) demands
    that forward and recomputation dispatch the same ops one by one, and FSDP's hooks inside a
    block dispatch others (tests/dist/test_dist_quirks.py)."""

    def __init__(self, saved: Saved, kept: frozenset[str]) -> None:
        super().__init__()
        self.saved, self.kept = saved, kept
        self.unread = UNREAD if kept >= EXCHANGES else NOTHING

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def keeps(self, name: str) -> bool:
        return name in self.kept or name in _here.get().kept

    def leaves_out(self, name: str) -> bool:
        return name in self.unread or name in _here.get().unread


class _Keep(_Mode):
    """Forward: remember the results of what is kept, in order."""

    def __init__(self, saved: Saved, kept: frozenset[str]) -> None:
        super().__init__(saved, kept)
        self.memory: set[int] = set()
        """Of what was kept. Nobody may write there: the recomputation would go on with other numbers, and no loss would tell."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = _name(func)
        if name == "" or name in COLLECTIVES_IN_PLACE:
            self._refuse_writing(func, args, kwargs or {})
        elif self.leaves_out(name):
            self.saved[name].append(tree_map_only(Tensor, _unread, out))
        elif self.keeps(name):
            # Detached: the original will carry the graph, which must not live as long as what is saved.
            value = tree_map_only(Tensor, Tensor.detach, out)
            self.saved[name].append(value)
            self.memory.update(_memory(value))
        return out

    def _refuse_writing(self, func: Any, args: Any, kwargs: Any) -> None:
        if not self.memory or not isinstance(func, torch._ops.OpOverload):
            return
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        silent = func._schema.name in COLLECTIVES_IN_PLACE
        written = [
            given.get(a.name)
            for a in func._schema.arguments
            if silent or (a.alias_info is not None and a.alias_info.is_write)
        ]
        if not self.memory.isdisjoint(_memory(written)):
            raise RuntimeError(f"{func._schema.name} writes over a result that was kept for backward (parallel.keep)")


class _Replay(_Mode):
    """Recomputation: hand the results out again instead of running the op."""

    def __enter__(self) -> Any:
        self.used: dict[str, int] = defaultdict(int)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if name == "" or not (self.leaves_out(name) or self.keeps(name)):
            return func(*args, **(kwargs or {}))
        index = self.used[name]
        self.used[name] += 1
        if index >= len(self.saved[name]):
            raise RuntimeError(f"{name}: the recomputation issues it more often than the forward pass did")
        result, self.saved[name][index] = self.saved[name][index], None  # freed as backward goes on
        assert result is not None, f"{name}: a second backward through a checkpointed block"
        return tree_map_only(_Unread, _nan, result)


def _unread(x: Tensor) -> _Unread:
    return _Unread(size=x.shape, dtype=x.dtype, device=x.device)


def _nan(of: _Unread) -> Tensor:
    """One number's memory; should somebody read it after all, all gradients say so."""
    return torch.full((), torch.nan, dtype=of.dtype, device=of.device).expand(of.size)


def _memory(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)}


def _name(func: Any) -> str:
    """Of an op that returns new tensors. What writes into a given one is never kept: its memory is somebody's to use again."""
    if not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
        return ""
    return func._schema.name


def contexts(kept: frozenset[str]) -> tuple[_Keep, _Replay]:
    """Around the forward pass and around its recomputation."""
    saved: Saved = defaultdict(list)
    return _Keep(saved, kept), _Replay(saved, kept)


def mark_kept(model: DiT, *, keep: Collection[Kept], share: float) -> None:
    """Tell the modules of checkpointed blocks what they keep besides. Before compilation, which leaves them out."""
    for block in checkpointed_blocks(model, share=share):
        for module, names in modules_that_keep(block, keep):
            module.forward = _in_scope(module.forward, Scope(kept=names))
            for layer in module.modules() if "aten::mm" in names and not isinstance(module, MoE) else ():
                if hasattr(layer, "keeps_sum"):
                    # A sum over tp ranks follows its product: kept is the sum alone, and neither runs again.
                    layer.keeps_sum = True  # type: ignore[assignment]
                    layer.forward = _in_scope(layer.forward, Scope(unread=PRODUCTS))  # type: ignore[method-assign]


def apply_activation_checkpointing(model: DiT, *, mode: Mode, share: float = 1.0) -> None:
    """Recompute blocks in backward, in place. The network draws no random numbers, so no generator state is kept."""
    if mode == "none":
        return
    kept = DECISIONS | EXCHANGES if mode == "selective" else DECISIONS
    for block in checkpointed_blocks(model, share=share):
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=functools.partial(contexts, kept),
        )


def checkpointed_blocks(model: DiT, *, share: float) -> Iterator[Block]:
    """`share` of the dense and of the sparse blocks."""
    for sparse in (False, True):
        blocks = [b for b in model.blocks if isinstance(b, Block) and isinstance(b.feed_forward, MoE) == sparse]
        chosen = checkpointed(len(blocks), share=share)
        yield from (block for n, block in enumerate(blocks) if n in chosen)


def modules_that_keep(block: Block, keep: Collection[Kept]) -> Iterator[tuple[nn.Module, frozenset[str]]]:
    """Modules of a block with the ops that are kept inside of them, outer ones first; none where nothing is kept besides."""
    if names := kept_in_attention(keep):
        yield block.self_attention, names
        if block.cross_attention is not None:
            yield block.cross_attention, names
    dense = PRODUCTS if "feed_forward" in keep else NOTHING
    if not isinstance(block.feed_forward, MoE):
        if dense:
            yield block.feed_forward, dense
        return
    moe = block.feed_forward
    if "experts" in keep:
        yield moe, PRODUCTS
        yield moe.router, NOTHING
    if moe.shared is not None and ("experts" in keep or dense):
        yield moe.shared, dense


def _in_scope(forward: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        token = _here.set(scope)
        try:
            return forward(*args, **kwargs)
        finally:
            _here.reset(token)

    return inside
