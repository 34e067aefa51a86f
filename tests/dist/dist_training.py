"""Workers of test_dist_training.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dist_runs import Layout, Life, copy_checkpoints, live, same, shards_of

from ecdit_train.errors import NonFiniteError
from ecdit_train.train.trainer import Trainer


def curves(
    here: Any, folder: Path, shards: Path, layouts: dict[str, Layout], extra: tuple[str, ...]
) -> dict[str, Life]:
    return {name: live(here, folder / name, shards, (*extra, *layout.words)) for name, layout in layouts.items()}


def looked_at(
    here: Any, folder: Path, shards: Path, variants: dict[str, tuple[str, ...]]
) -> dict[str, tuple[Life, Life]]:
    """Each variant blind and with sample grids."""
    out = {}
    for name, extra in variants.items():
        blind = live(here, folder / name / "blind", shards, (*extra, "observe.sample_every=0"))
        seeing = live(here, folder / name / "seeing", shards, (*extra, "observe.sample_every=2"))
        out[name] = blind, seeing
    return out


def interrupted(here: Any, folder: Path, shards: Path, variants: dict[str, tuple[str, ...]]) -> dict[str, list[Life]]:
    """Each variant in one life, and in three."""
    out = {}
    for name, extra in variants.items():
        whole = live(here, folder / name / "whole", shards, extra)
        parts = [live(here, folder / name / "parts", shards, extra, stop_after=stop) for stop in (1, 5, None)]
        out[name] = [whole, *parts]
    return out


def resumed_elsewhere(here: Any, run: Path, shards: Path, layouts: dict[str, Layout], extra: tuple[str, ...]
                      ) -> dict[str, dict[str, str]]:  # fmt: skip
    """Digests of the whole tensors that each layout loads from the run's newest checkpoint."""
    out = {}
    for name, layout in layouts.items():
        copy = run.parent / f"{run.name}-on-{name}-of-{here.world}"
        copy_checkpoints(here, run, copy)
        out[name] = live(here, copy, shards, (*extra, *layout.words)).loaded
    return out


def poisoned(here: Any, folder: Path, shards: Path, variants: dict[str, tuple[str, ...]], where: str) -> dict[str, Any]:
    """One rank's loss (or one of its gradients) becomes NaN in the third step."""
    out = {}
    for name, extra in variants.items():
        seen: dict[str, Any] = {}

        def meddle(trainer: Trainer, seen: dict[str, Any] = seen) -> None:
            seen["trainer"] = trainer
            at_step_3 = lambda: here.rank == here.world - 1 and trainer.state.step == 2  # noqa: E731
            run_step = trainer._step

            def step(taken: Any) -> Any:
                seen["before"] = shards_of(trainer)
                return run_step(taken)

            trainer._step = step  # type: ignore[method-assign]
            if where == "loss":
                loss = trainer.flow.loss
                object.__setattr__(
                    trainer.flow, "loss", lambda *a, **k: loss(*a, **k) * (math.nan if at_step_3() else 1.0)
                )
            else:
                clip = trainer.parallel.clip

                def spoil(*, max_norm: float) -> Any:
                    if at_step_3():
                        grad = next(
                            p.grad for n, p in trainer.state.params.items() if n == "blocks.0.feed_forward.up.weight"
                        )
                        (grad.to_local() if hasattr(grad, "to_local") else grad)[0, 0] = math.inf
                    return clip(max_norm=max_norm)

                object.__setattr__(trainer.parallel, "clip", spoil)

        try:
            live(here, folder / name, shards, extra, before=meddle)
            message, code = "", 0
        except NonFiniteError as e:
            message, code = str(e), e.exit_code
        mine = {"message": message, "code": code, "step": seen["trainer"].state.step,
                "unchanged": same(seen["before"], shards_of(seen["trainer"]))}  # fmt: skip
        out[name] = here.all_gather_json(mine)
    return out
