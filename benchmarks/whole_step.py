"""Whole steps of a real run, as the trainer makes them: loader, encoders, step, moving average and what is gathered for a record,
with something around some of them. For `gpu_check`: a GPU that is told to refuse every wait.

The run is of the demo's kind, with RMSProp, and asks for no state at rest while it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from data_pipeline.shapes.make import make_shapes
from ecdit_train.build import build_trainer
from ecdit_train.config.compose import compose
from ecdit_train.config.validate import validate
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.supervise.stop import StopRequest

WARM = 6
"""Steps before the first that is looked at: allocations, library handles and compilation may wait for the device."""


def whole_steps(
    folder: Path,
    *,
    runtime: Runtime,
    around: Callable[[], AbstractContextManager[Any]],
    words: Sequence[str] = (),
    steps: int = 4,
) -> float:
    """Train in `folder` (empty; its own data are made there by rank 0). `around` is entered after WARM steps and left `steps` steps
    later; inside, the trainer issues steps, reads the numbers of those before, fetches and encodes the batches ahead. Its end
    and the run's last steps are outside. Returns the last loss; raises what `around` raises."""
    if runtime.rank == 0:
        make_shapes(folder / "shards", count=640, resolution=24, seed=0, samples_per_shard=160)
    runtime.barrier()
    own = (
        *(
            "experiment=shapes_tiny",
            "optim=rmsprop",
            "optim.lr=1e-4",
            "optim.warmup_steps=2",
            "optim.ema_decay=0.99",
            f"run={folder / 'run'}",
        ),
        *(
            f"data.shards={folder / 'shards'}",
            f"train.steps={WARM + steps + 2}",
            "train.global_batch=16",
            "train.microbatch=8",
        ),
        *("observe.log_every=1000", "observe.sample_every=0", "observe/sinks=none", "health.digest_every=0"),
        *("checkpoint.every_steps=1000", "checkpoint.save=blocking", "watch.agree_every=1000"),
    )
    config = compose([*own, *words], local=False)
    validate(config, world=runtime.world)
    trainer, inside, losses = build_trainer(config, runtime), ExitStack(), list[float]()
    step, made = trainer._step, trainer._made

    def looked_at(taken: Any) -> None:
        if trainer.state.step == WARM:
            inside.enter_context(around())
        elif trainer.state.step == WARM + steps:
            inside.close()
        step(taken)

    def noted(done: Any, numbers: Any, verdict: Any) -> None:
        losses.append(numbers.loss)
        made(done, numbers, verdict)

    trainer._step, trainer._made = looked_at, noted  # type: ignore[method-assign]
    try:
        with inside, StopRequest() as stop:
            trainer.run(stop)
    finally:
        trainer.close()
    return losses[-1]
