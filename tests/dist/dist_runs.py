"""What ranks do in the tests of whole runs: the real composition root on this layout, watched.

Everything here is called on every rank (`dist_harness.run_distributed`) and gives the same answer on all of them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_runs import words
from torch import Tensor

from data_pipeline.loader import StreamingLoader
from ecdit_train.build import build_trainer
from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import validate
from ecdit_train.parallel.placement import local
from ecdit_train.parallel.weights import full_tensors
from ecdit_train.supervise.stop import StopRequest
from ecdit_train.train.state import parameter_of
from ecdit_train.train.step import Numbers
from ecdit_train.train.trainer import Trainer

TWO_HEADS = ("model.width=128", "model.heads=2", "model.kv_heads=1")
"""Two tensor-parallel ranks then hold the same key/value head."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    world: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Life:
    """One start of a run, the same on every rank."""

    finished: bool
    step: int
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    order: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]
    """Positions and sample keys of every global step, in the order of the global batch."""
    loaded: dict[str, str]
    """Digests of the whole tensors before the first step."""
    tensors: dict[str, str]
    """The same after the last one."""


def configure(here: Any, run: Path, shards: Path, *extra: str) -> RunConfig:
    """`--config-dir=DIR` may be among the words."""
    folder = next((w.partition("=")[2] for w in extra if w.startswith("--config-dir=")), None)
    given = [w for w in extra if not w.startswith("--")]
    config = compose(words(run, shards, *TWO_HEADS, *given), local=False, config_dir=folder)
    validate(config, world=here.world)
    return config


def live(here: Any, run: Path, shards: Path, extra: tuple[str, ...], *, stop_after: int | None = None,
         before: Callable[[Trainer], None] | None = None) -> Life:  # fmt: skip
    """Start or resume the run on all ranks; `before` may meddle with the trainer."""
    seen: list[tuple[list[int], list[str]]] = []
    results: list[Numbers] = []
    deliver = StreamingLoader.__next__

    def watched(loader: StreamingLoader) -> Any:
        batch = deliver(loader)
        seen.append((batch.position.tolist(), list(batch.keys)))
        return batch

    StreamingLoader.__next__ = watched  # type: ignore[method-assign]
    try:
        with StopRequest() as stop:
            trainer = build_trainer(configure(here, run, shards, *extra), here, stop_after=stop_after)
            loaded = digests(trainer)
            made = trainer._made
            trainer._made = lambda done, *said: (results.append(said[0]), made(done, *said))[1]  # type: ignore[method-assign]
            if before is not None:
                before(trainer)
            try:
                finished = trainer.run(stop)
            finally:
                trainer.close()
    finally:
        StreamingLoader.__next__ = deliver  # type: ignore[method-assign]
    mine = {"dp": trainer.parallel.mesh.dp_rank, "seen": seen, "losses": [r.loss for r in results]}
    ranks = here.all_gather_json(mine)
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks), "ranks disagree on the global loss"
    by_dp = {rank["dp"]: rank["seen"] for rank in ranks}
    assert all(rank["seen"] == by_dp[rank["dp"]] for rank in ranks), "tp ranks see different samples"
    shares = [by_dp[d] for d in sorted(by_dp)]
    order = tuple(
        (tuple(p for share in step for p in share[0]), tuple(k for share in step for k in share[1]))
        for step in zip(*shares, strict=True)
    )
    return Life(
        finished=finished, step=trainer.state.step, order=order, loaded=loaded, tensors=digests(trainer),
        losses=tuple(r.loss for r in results), norms=tuple(r.grad_norm for r in results),
    )  # fmt: skip


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, optimizer state and average as global tensors, gathered without the checkpoint's own code."""
    tensors = trainer.state.tensors()
    placements = {name: trainer.parallel.placements[parameter_of(name)] for name in tensors}
    return full_tensors(tensors, placements, trainer.parallel.mesh)


def digests(trainer: Trainer) -> dict[str, str]:
    return {name: digest(t) for name, t in whole(trainer).items()}


def digest(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()


def shards_of(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's part of everything, copied."""
    return {name: local(t).clone() for name, t in trainer.state.tensors().items()}


def copy_checkpoints(here: Any, source: Path, run: Path) -> None:
    """Another run folder with the same checkpoints."""
    if here.rank == 0:
        shutil.copytree(source / "checkpoints", run / "checkpoints")
    here.barrier()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
