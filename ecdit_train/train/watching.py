"""What a run tells of its steps besides the loss: gathered where it is made, read when a record is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import StorageError
from ecdit_train.model.router import Router
from ecdit_train.observe.goodput import Useful
from ecdit_train.observe.metrics import MetricWindow, Sums
from ecdit_train.observe.nodes import Nodes, nodes_record
from ecdit_train.observe.routing_numbers import RoutingNumbers, written_at
from ecdit_train.observe.routing_scalars import routing_maxima, routing_record, routing_sums, weight_sums
from ecdit_train.observe.timesteps import loss_by_timestep, loss_sums
from ecdit_train.supervise.ownership import Ownership

from .step import Numbers, Seen

logger = logging.getLogger("ecdit.train")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a step adds to the record, once it is known that its update was made; device tensors."""

    sums: list[dict[str, Tensor]]
    maxima: list[tuple[str, Tensor]]


class Watching:
    """Puts the microbatches of a run's updates into its window, and reads what they say together. Nothing here waits for the
    device, and nothing that is trained on changes."""

    def __init__(self, config: RunConfig, *, window: MetricWindow, routers: Sequence[Router]) -> None:
        self._config = config
        self._window = window
        self._routers = routers
        self._layers = config.sparse_layers
        self._useful = Useful()
        self.nodes: Nodes | None = None
        """Of the life that is at work."""
        self.numbers: RoutingNumbers | None = None
        """What is to be written beside the record that was read last."""

    def measures_at(self, step: int) -> bool:
        """Whether the held-out images are measured after so many updates."""
        c = self._config
        return c.validation.images > 0 and (step % c.validation.every_steps == 0 or step == c.train.steps)

    def logs_at(self, step: int) -> bool:
        """Whether a record follows so many updates."""
        c = self._config
        return self.measures_at(step) or step % c.observe.log_every == 0 or step == c.train.steps

    def see(self, step: int, seen: Sequence[Seen]) -> Watched:
        """All microbatches of the update that makes `step`: losses of every update, routing of those that a record follows. It is
        not known yet whether that update is made."""
        sums, maxima = [loss_sums(micro.error_B, t_B=micro.t_B) for micro in seen], list[tuple[str, Tensor]]()
        if self._layers and self.logs_at(step):
            for micro in seen:
                sums.append(routing_sums(micro.assignments, layers=self._layers, t_B=micro.t_B))
                maxima += routing_maxima(micro.assignments, layers=self._layers)
            sums.append(weight_sums(self._routers, layers=self._layers))
        return Watched(sums=sums, maxima=maxima)

    def add(self, numbers: Numbers, watched: Watched) -> None:
        """An update that was made."""
        window, clip = self._window, self._config.optim.clip_norm
        for sums in watched.sums:
            window.add_sums(sums)
        for name, largest in watched.maxima:
            window.add(name, largest)
        window.add("train/loss", numbers.loss)
        window.add("optim/grad_norm", numbers.grad_norm)
        window.add("optim/grad_norm_max", numbers.grad_norm)
        window.add("optim/clipped_frac", float(0 < clip < numbers.grad_norm))
        for name, value in numbers.auxiliary.items():
            window.add(f"train/{name}_loss", value)
        window.step_done()

    def read(self, step: int, sums: Sums) -> dict[str, float]:
        """Numbers of the sums over the window that ends with `step`, all microbatches and ranks."""
        c = self._config
        due = written_at(step, log_every=c.observe.log_every, steps=c.train.steps)
        self.numbers = RoutingNumbers.of(sums, step=step, layers=self._layers) if due else None
        return {**loss_by_timestep(sums), **routing_record(sums, layers=self._layers), **nodes_record(sums)}

    def write(self, run: Path, ownership: Ownership) -> None:
        """What is too much for a record, into its own file; before the record, so that who reads that finds it. A disk that refuses
        is no reason not to train. Raises RunOwnedError."""
        if self.numbers is None:
            return
        try:
            ownership.still_ours()  # now: a folder that was moved or replaced is not to be made, or written into
            self.numbers.save(run)
        except (OSError, StorageError) as error:
            step = self.numbers.step
            logger.warning("the routing numbers of step %d cannot be written, training goes on: %s", step, error)

    def look(self) -> None:
        """Right before a record is read: what the machines do."""
        if self.nodes is not None:
            self._window.add_sums(self.nodes.sums())

    def begin(self, step: int, *, nodes: Nodes) -> None:
        """A life goes on from `step`."""
        self.nodes = nodes
        self._useful = Useful(first=step)
        self._window.begin()

    def rewind(self, step: int) -> None:
        """Updates after it were for nothing."""
        self._useful.rewind(step)

    def goodput(self, step: int, step_s: float, *, since: float) -> float:
        """The share of the time since then (`time.monotonic`) that went into steps that count; `step_s`: of those
        since the last record."""
        self._useful.add(step, step_s)
        return self._useful.share(time.monotonic() - since)
