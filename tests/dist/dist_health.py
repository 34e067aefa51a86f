"""Workers of test_dist_health.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from dist_runs import Layout, configure, digests, live

from ecdit_train.build import build_trainer
from ecdit_train.errors import CorruptionError
from ecdit_train.parallel.placement import local
from ecdit_train.train.trainer import Trainer


def one_rank_sees_nan(
    here: Any, folder: Path, shards: Path, words: tuple[str, ...], rank: int, gone: bool
) -> dict[str, Any]:
    """Batch 3's loss is NaN on one rank only; `gone`: the batch is left out of the data instead."""
    acts: list[str] = []

    def meddle(trainer: Trainer) -> None:
        judge, fetch, step = trainer.guard.judge, trainer.batches.fetch, trainer._step
        place = {"batch": -1}

        def watched() -> Any:
            raw = fetch()
            while gone and int(raw.position[0]) // 8 == 3:
                trainer.batches.encode(raw)
                raw = fetch()
            return raw

        def placed(taken: Any) -> None:
            place["batch"] = int(taken.batch.position_B[0]) // 8
            step(taken)

        def noted(numbers: Any) -> Any:
            verdict = judge(numbers)
            acts.append(verdict.act)
            return verdict

        trainer.batches.fetch, trainer.guard.judge, trainer._step = watched, noted, placed  # type: ignore[method-assign]
        loss = trainer.flow.loss
        spoiled = lambda: not gone and here.rank == rank and place["batch"] == 3  # noqa: E731
        object.__setattr__(trainer.flow, "loss", lambda *a, **k: loss(*a, **k) * (math.nan if spoiled() else 1.0))

    life = live(here, folder, shards, words, before=meddle)
    return {"acts": here.all_gather_json(acts), "tensors": life.tensors, "finished": life.finished}


def validated(
    here: Any, folder: Path, shards: Path, layouts: dict[str, Layout], words: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """What each layout measures with the same weights, in fp32: the first ones, and then with every second router turned round."""
    out = {}
    for name, layout in layouts.items():
        trainer = build_trainer(configure(here, folder / name, shards, *words, *layout.words), here)
        assert trainer.validation is not None
        first = trainer.validation.measure()
        assert not any("drift" in key for key in first), "there is nothing to compare with"
        with torch.no_grad():
            for router in trainer.parallel.model.routers[::2]:
                local(router.weight).mul_(-1.0)
        found = trainer.validation.measure()
        trainer.close()
        out[name] = found
        said = here.all_gather_json(out[name])
        assert all(one == said[0] for one in said), "ranks disagree"
    return out


def flipped(
    here: Any, folder: Path, shards: Path, layouts: dict[str, Layout], words: tuple[str, ...]
) -> dict[str, list[Any]]:
    """For each layout: copies compared while sound, and per rank that holds a copy what is said after one bit of it was flipped."""
    out: dict[str, list[Any]] = {}
    for name, layout in layouts.items():
        trainer = build_trainer(configure(here, folder / name, shards, *words, *layout.words), here)
        values = {n: (p.tensor, p.placement) for n, p in trainer.placed().items()}
        found: list[Any] = [trainer.digests.compare(values, step=1)]  # type: ignore[union-attr]
        held_RT = trainer.digests._held  # type: ignore[union-attr]
        assert held_RT is not None
        names = sorted(values)
        copied = [
            n for t, n in enumerate(names) if held_RT[:, t].all() and len(set(held_RT[:, t].tolist())) < here.world
        ]
        target = copied[len(copied) // 2] if copied else names[0]
        for culprit in range(here.world):
            part = local(values[target][0])
            held = here.all_gather_json(part.numel())
            if held[culprit] == 0:
                continue
            bits = part.view(torch.int32).reshape(-1)
            if here.rank == culprit:
                bits[0] ^= 1
            try:
                trainer.digests.compare(values, step=9)  # type: ignore[union-attr]
                said = ""
            except CorruptionError as error:
                said = str(error)
            assert here.all_gather_json(said) == [said] * here.world
            found.append([culprit, said])
            if here.rank == culprit:
                bits[0] ^= 1
        found.append(trainer.digests.compare(values, step=1))  # type: ignore[union-attr]
        trainer.close()
        out[name] = found
    return out


def alone(here: Any, folder: Path, shards: Path, words: tuple[str, ...]) -> dict[str, str]:
    trainer = build_trainer(configure(here, folder, shards, *words), here)
    found = digests(trainer)
    trainer.close()
    return found
