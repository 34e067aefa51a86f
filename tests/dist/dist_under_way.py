"""Workers of test_dist_under_way.py."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from dist_runs import live, shards_of

from ecdit_train.errors import NonFiniteError
from ecdit_train.parallel.placement import local
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.train.device_guard import Reading
from ecdit_train.train.trainer import Trainer


def bits(trainer: Trainer) -> str:
    """Of all that this rank holds."""
    found = hashlib.sha256()
    for _, t in sorted(shards_of(trainer).items()):
        found.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def spoiled(
    here: Any, folder: Path, shards: Path, words: tuple[str, ...], where: str, rank: int, step: int
) -> list[dict[str, Any]]:
    """One number of one rank is wrong in one step, and the host is a step ahead when it learns of that: what each rank then has."""
    known: dict[str, Any] = {}

    def meddle(trainer: Trainer) -> None:
        here_and_now = lambda: here.rank == rank and trainer.state.step == step - 1  # noqa: E731
        run_step, known["trainer"], known["issued"] = trainer._step, trainer, []

        def noted(taken: Any) -> None:
            if trainer.state.step == step - 1:
                known["before"] = bits(trainer)
            run_step(taken)
            known["issued"].append(trainer.state.step)
            if trainer.state.step >= step:
                known["after"] = bits(trainer)

        trainer._step = noted  # type: ignore[method-assign]
        if where == "loss":
            loss = trainer.flow.loss
            spoil = lambda *a, **k: loss(*a, **k) * (math.nan if here_and_now() else 1.0)  # noqa: E731
            object.__setattr__(trainer.flow, "loss", spoil)
        elif where == "auxiliary":
            router = trainer.parallel.model.routers[-1]

            def infinite(module: Any, args: Any, out: Any) -> Any:
                if here_and_now():
                    out.losses["balance"] = out.losses["balance"] + math.inf  # a constant: no gradient knows of it
                return out

            router.register_forward_hook(infinite)
        else:
            clip = trainer.parallel.clip

            def torn(*, max_norm: float) -> Any:
                if here_and_now():
                    name = next(n for n in trainer.state.params if "experts" in n)
                    local(trainer.state.params[name].grad).view(-1)[-1] = math.nan
                return clip(max_norm=max_norm)

            object.__setattr__(trainer.parallel, "clip", torn)

    try:
        live(here, folder, shards, words, before=meddle)
        said, code = "", 0
    except NonFiniteError as error:
        said, code = str(error), error.exit_code
    mine = {"said": said, "code": code, "step": known["trainer"].state.step, "issued": known["issued"][-1],
            "unchanged": known["before"] == known["after"] == bits(known["trainer"])}  # fmt: skip
    return here.all_gather_json(mine)


def reads(here: Any, folder: Path, shards: Path, words: tuple[str, ...], first: int, last: int) -> list[list[str]]:
    """By rank: what the host read off tensors from step `first` to step `last` of a run, "numbers" for those of a step before."""
    found: list[str] = []
    inside = [0]
    names = ("tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__")
    real = {name: getattr(torch.Tensor, name) for name in names}
    get, any_rank = Reading.get, Runtime.any_rank

    def allowed(call: Any, word: str) -> Any:
        def instead(*args: Any) -> Any:
            found.append(word)
            inside[0] += 1
            try:
                return call(*args)
            finally:
                inside[0] -= 1

        return instead

    def meddle(trainer: Trainer) -> None:
        step = trainer._step

        def noted(taken: Any) -> None:
            if trainer.state.step == first - 1:
                for name in names:
                    told = lambda t, *a, name=name, **k: (inside[0] or found.append(name), real[name](t, *a, **k))[1]  # noqa: E731
                    setattr(torch.Tensor, name, told)
                Reading.get = allowed(get, "numbers")  # type: ignore[method-assign]
                Runtime.any_rank = allowed(any_rank, "agree")  # type: ignore[method-assign]
            if trainer.state.step == last:
                for name in names:
                    setattr(torch.Tensor, name, real[name])
                Reading.get, Runtime.any_rank = get, any_rank  # type: ignore[method-assign]
            step(taken)

        trainer._step = noted  # type: ignore[method-assign]

    live(here, folder, shards, words, before=meddle)
    return here.all_gather_json(found)
