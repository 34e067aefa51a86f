"""A run over time: data in, steps, what people see, checkpoints, and a clean stop when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ecdit_train.config.schema import RunConfig
from ecdit_train.diffusion.flow import Flow
from ecdit_train.errors import NonFiniteError
from ecdit_train.observe.console import Progress
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.observe.routing import routing_scalars
from ecdit_train.observe.sinks import Sinks

from .optim import learning_rate
from .state import TrainState
from .step import Microbatch, Spread, StepResult, split, train_step
from .stop import StopRequest


class Batches(Protocol):
    """The loader as the loop sees it: this rank's share of each global step, on the device."""

    def fetch(self) -> Any:
        """The next batch as the loader has it; what is waited here is the loader's doing."""
        ...

    def encode(self, raw: Any) -> Microbatch:
        """What `fetch` gave, through the frozen encoders and on the device."""
        ...

    def substituted(self) -> int:
        """Unreadable samples replaced so far in this life, on this rank."""
        ...

    def close(self) -> None: ...


@dataclass(kw_only=True)
class Loop:
    """Everything a run needs; `build` puts it together."""

    config: RunConfig
    state: TrainState
    flow: Flow
    batches: Batches
    spread: Spread
    sinks: Sinks
    progress: Progress
    window: MetricWindow
    save: Callable[[int], None]
    """Commit a checkpoint of the state after this many updates."""
    show: Callable[[int], None]
    """Draw sample grids and routing maps."""
    any_rank: Callable[[bool], bool]
    """True on every rank when it is true on one."""
    stop_after: int | None = None
    """Stop as if a signal had come once this many updates are done (drills, demo)."""

    def run(self, stop: StopRequest) -> bool:
        """Train to `train.steps`. Returns True when finished, False when stopped on request with everything saved.

        A request that came before the first step is met after it, so that every life moves the run on.
        """
        c, state, window = self.config, self.state, self.window
        substituted = 0
        while state.step < c.train.steps:
            with window.waiting():
                raw = self.batches.fetch()
            before, substituted = substituted, self.batches.substituted()
            result = self._step(self.batches.encode(raw))
            state.step += 1
            last = state.step == c.train.steps

            window.add("train/loss", result.loss)
            window.add("optim/grad_norm", result.grad_norm)
            window.add("optim/grad_norm_max", result.grad_norm)
            window.add("optim/clipped_frac", float(0 < c.optim.clip_norm < result.grad_norm))
            window.add("data/substituted", float(substituted - before))
            if result.balance_loss is not None:
                window.add("train/balance_loss", result.balance_loss)
            window.step_done()
            if state.step % c.observe.log_every == 0 or last:
                self._log(result)

            stopping = self.any_rank(stop.name is not None or state.step == self.stop_after)
            showing = c.observe.sample_every > 0 and (state.step % c.observe.sample_every == 0 or last)
            saving = stopping or last or state.step % c.checkpoint.every_steps == 0
            if showing or saving:  # a pause waits for the device
                with window.paused():
                    if showing:
                        self.show(state.step)
                    if saving:
                        self.save(state.step)
            if stopping and not last:
                why = stop.name or ("--stop-after" if state.step == self.stop_after else "another rank")
                self.progress.message(
                    f"stopped by {why} after step {state.step}, everything saved; go on with: ecdit resume {c.run}"
                )
                return False
        return True

    def _step(self, batch: Microbatch) -> StepResult:
        """One optimizer step; a non-finite one names the step and the samples, so that it can be looked at."""
        c, state = self.config, self.state
        lr = learning_rate(state.step, c.optim, total_steps=c.train.steps)
        self.window.add("optim/lr", lr)
        try:
            return train_step(
                list(split(batch, size=c.train.microbatch)),
                model=state.model,
                optimizer=state.optimizer,
                lr=lr,
                max_norm=c.optim.clip_norm,
                flow=self.flow,
                pool=c.pool_tokens,
                patch=c.model.patch,
                spread=self.spread,
                after=self._update_average,
            )
        except NonFiniteError as e:
            first = int(batch.position_B[0]) // c.train.global_batch * c.train.global_batch
            last = first + c.train.global_batch - 1
            raise NonFiniteError(f"step {state.step}, samples {first} to {last}: {e}") from e

    def _log(self, result: StepResult) -> None:
        """One record for every log interval; routing as the last step had it."""
        c, step = self.config, self.state.step
        self.window.add_all(routing_scalars(result.assignments, top_k=c.moe.top_k))
        self.window.add("train/images", float(step * c.train.global_batch))
        record = self.window.flush(self.spread.reduce)
        self.sinks.log(step, record)
        self.progress.update(step, record)
        if record["data/substituted"] > 0:
            self.progress.message(
                f"step {step}: {record['data/substituted']:.0f} unreadable samples substituted since the last log step, "
                f"named in {c.run}/quarantine-*.jsonl"
            )

    def close(self) -> None:
        """Flush what people see and end the loader's threads; also after an error."""
        self.progress.close()
        self.sinks.close()
        self.batches.close()

    def _update_average(self) -> None:
        if self.state.ema is not None:
            self.state.ema.update(self.state.step)
