"""A run over time: data in, steps, what people see, checkpoints, and a clean stop when asked."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ecdit_train.checkpoint.layout import Placed
from ecdit_train.checkpoint.manager import Resumed
from ecdit_train.config.convert import to_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import Microbatch, Place, split
from ecdit_train.errors import ConfigError, NonFiniteError, Problem, StorageError
from ecdit_train.observe.console import Progress
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.observe.nodes import Nodes, node_key
from ecdit_train.observe.sinks import Sinks
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.parallel.digest import Digests
from ecdit_train.run_folder import quarantine_path
from ecdit_train.supervise.beats import Heart, untold
from ecdit_train.supervise.ownership import Ownership
from ecdit_train.supervise.stop import StopRequest

from .ahead import Ahead, Taken
from .contracts import Batches, Drawer
from .guard import Guard, Verdict
from .met import met
from .optim import learning_rate
from .pools import check_pool, pool_of
from .saving import Saves
from .state import TrainState, placed
from .step import Numbers, train_step
from .under_way import UnderWay, agree, tell_refused
from .validation import Validation
from .watching import Watched, Watching

OBJECTS = ("window", "pool", "guard", "validation", "quarantine", "words")
"""What a checkpoint holds besides its tensors, its place in the data and its configuration; older ones lack some."""

logger = logging.getLogger("ecdit.train")


@dataclass(kw_only=True)
class Trainer:
    """Everything a run needs; `build` puts it together."""

    config: RunConfig
    parallel: ParallelContext
    state: TrainState
    flow: Flow
    batches: Batches
    saves: Saves
    window: MetricWindow
    progress: Progress
    sinks: Sinks
    drawer: Drawer | None
    """None where nothing can be drawn."""
    stop_after: int | None = None
    """Stop as if a signal had come once this many updates are done (drills, demo)."""
    flops: tuple[tuple[int, float], ...] = ()
    """(first step, the model's FLOPs of a step from there on): they change between two stages of a router."""
    guard: Guard
    validation: Validation | None = None
    digests: Digests | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    """The newest validation: its step and losses."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """What made this life's checkpoints; the same on all ranks."""
    heart: Heart = field(default_factory=lambda: Heart(None, rank=0))
    """Told each phase as it begins, in the same order on all ranks."""
    ownership: Ownership = field(default_factory=Ownership)
    """Of the run folder."""
    ahead: Ahead = field(init=False)
    _went_back: bool = False
    _under_way: list[UnderWay] = field(default_factory=list)
    """Steps that the device was asked for and whose numbers nobody has read, oldest first; two at most, and for a moment."""
    _again: list[Taken] = field(default_factory=list)
    """Batches of steps that were refused with one before them."""
    _place: Place | None = None
    """Of the newest batch that was trained on in this life."""
    _first: int = 0
    _began: float = 0.0
    resumed: Resumed | None = None
    """Where this life goes on from."""
    watching: Watching = field(init=False)

    def __post_init__(self) -> None:
        self.watching = Watching(self.config, window=self.window, routers=self.parallel.model.routers)
        device, waiting = self.parallel.runtime.device, self.window.waiting
        self.ahead = Ahead(self.batches, device=device, heart=lambda: self.heart, waiting=waiting)
        self._names = set(self.state.tensors())

    def resume(self) -> Resumed | None:
        """Go on from the newest sound checkpoint of the run folder, if it has one; says what was loaded and what was passed over.

        What may be gone on from, and in which order that is decided:

        1. The command's words against the folder's resolved.yaml (`config.compat`, before anything else): a key of the run's
           identity is refused, one of its schedule needs to be asked for, any other is taken; what changed is printed.
        2. The folder is owned (`supervise.lease`), then leftovers of other lives are deleted.
        3. Rank 0 lists the committed steps for all; the newest is tried first.
        4. All ranks check what they need of it before one of them loads anything. Damaged: said, the one before is tried, and it
           is set aside once an older one has been loaded. All damaged: the run ends, it never starts over by itself. A disk that
           fails for the moment is asked again, and ends the life if it stays so: nothing is set aside for that.
        5. Sound, but of another network: the run ends; no older step would fit better.
        6. Further than `train.steps`, a pool that cannot be made on this layout, data that are not the same: the run ends.
        7. No step at all: `train.init_from`'s weights, or first weights.
        """
        resumed = self._load()
        self.saves.start(0 if resumed is None else resumed.step, committed=resumed is not None)
        if resumed is None:
            return None
        if resumed.step > self.config.train.steps:
            rule = f"{self.config.run} is already at step {resumed.step}"
            raise ConfigError(
                Problem(field="train.steps", value=self.config.train.steps, rule=rule, nearest=resumed.step)
            )
        check_pool(self.config, self.parallel.mesh, before=resumed.objects.get("pool"))
        self._take(resumed)
        self.batches.load_state_dict(resumed.objects["loader"])
        self.guard.load_state_dict(resumed.objects.get("guard", {}))
        return resumed

    def placed(self) -> dict[str, Placed]:
        """Every tensor of the state with its place in the global tensor."""
        return placed(self.state.tensors(), self.parallel)

    def run(self, stop: StopRequest) -> bool:
        """Train to `train.steps`. Returns True when finished, False when stopped on request with everything saved.

        A request that came before the first step is met after it, so that every attempt moves the run on.
        """
        c, state, watching = self.config, self.state, self.watching
        self._first, self._began = state.step, time.perf_counter()
        self.heart.also, self.window.inside = self.window.enter, self.parallel.exchange_seconds
        runtime = self.parallel.runtime
        said = runtime.all_gather_json([node_key(), self.parallel.mesh.tp_rank == 0])
        watching.begin(state.step, nodes=Nodes(said, rank=runtime.rank, device=runtime.device))
        ask = partial(agree, every=c.watch.agree_every, ownership=self.ownership, runtime=runtime)
        gc.freeze()  # what is built stays: a collection in the middle of a step need not look at it
        while state.step < c.train.steps:
            self._step(self._next())
            last = state.step == c.train.steps
            ends, writing = state.step == self.stop_after, self.saves.writing
            agreed = ask(state.step, known=ends, asked=bool(stop.name), writing=writing)
            stopping = agreed.stopping
            if not (stopping or last or self._again):
                self.ahead.prepare(state.step + 1)  # while the device works on this step
            if not agreed.writing:
                self.saves.settle()
            # What was left out by going back is remembered by the next checkpoint, so that one comes first.
            saving = stopping or last or self._went_back or self.saves.due(state.step)
            showing = c.observe.sample_every > 0 and (state.step % c.observe.sample_every == 0 or last)
            digest = c.health.digest_every > 0 and state.step % c.health.digest_every == 0
            at_rest = saving or showing or digest or watching.logs_at(state.step)
            if self._settle(0 if at_rest else 1) and at_rest:
                self._went_back = False
                self._at_rest(saving=saving, showing=showing, digest=digest, last=stopping or last)
            elif at_rest:
                continue  # this update was not made
            if stopping and not last:
                why = stop.name or ("--stop-after" if state.step == self.stop_after else "another rank")
                self.progress.message(
                    f"stopped by {why} after step {state.step}, everything saved; go on with: ecdit resume {c.run}"
                )
                return False
        return True

    def _next(self) -> Taken:
        """The batch of the next step. One whose step has to be done again comes first."""
        if self._again:
            return self._again.pop(0)
        try:
            taken = self.ahead.take(self.state.step + 1)
        except Exception:
            tell_refused(self._under_way, self.progress.message)  # it comes before what is wrong with the data
            raise
        before = {} if self._place is None else self._place.counts
        counts, self._place = taken.place.counts, taken.place
        self.window.add_all({name: float(count - before.get(name, 0)) for name, count in counts.items()})
        self.window.add_all(taken.place.levels)
        return taken

    def _step(self, taken: Taken) -> None:
        """Ask the device for one optimizer step."""
        c, state = self.config, self.state
        lr = learning_rate(state.step, c.optim, total_steps=c.train.steps)
        for router in self.parallel.model.routers:
            router.at_step(state.step)
        for first, flops in self.flops:
            if first <= state.step:
                self.window.flops_per_step = flops
        watched: list[Watched] = []
        issued = train_step(
            list(split(taken.batch, size=c.train.microbatch)),
            parallel=self.parallel,
            state=state,
            guard=self.guard.device,
            lr=lr,
            max_norm=c.optim.clip_norm,
            flow=self.flow,
            group_tokens=c.group_tokens,
            watch=lambda seen: watched.append(self.watching.see(state.step + 1, seen)),
            before=self.saves.copied,
            enter=self.heart.enter,
        )
        state.step += 1
        self._under_way.append(UnderWay(step=state.step, taken=taken, issued=issued, lr=lr, watched=watched[0]))

    def _settle(self, keep: int) -> bool:
        """Learn what became of the steps under way, oldest first, until `keep` are left. False where an update was not made: those
        behind it were refused with it, and their batches come again."""
        while len(self._under_way) > keep:
            done = self._under_way.pop(0)
            self.heart.enter("exchange")
            numbers = done.issued.numbers()
            verdict = self.guard.judge(numbers)
            if not numbers.applied:
                self._again = [other.taken for other in self._under_way] + self._again
                self._under_way = []
                self.state.restore_step(done.step - 1)
                self._leave_out(done.taken.batch, verdict)
                self.guard.go_on()
                return False
            self._made(done, numbers, verdict)
        return True

    def _made(self, done: UnderWay, numbers: Numbers, verdict: Verdict) -> None:
        """An update that was made enters the record."""
        self.window.add("optim/lr", done.lr)
        self.watching.add(numbers, done.watched)
        if verdict.act == "report":
            self.progress.message(f"step {done.step}: {verdict.words}")
            self.sinks.event(verdict.alert, done.step, verdict.words)
        if done.step == self._first + 1:
            self.state.check_names(self._names)
            self.progress.message(
                f"  step {done.step} took {time.perf_counter() - self._began:.1f} s with all that comes first; "
                f"a line every {self.config.observe.log_every} steps"
            )

    def _at_rest(self, *, saving: bool, showing: bool, digest: bool, last: bool) -> None:
        """What is done with a state whose updates are all known to be made."""
        step, watching = self.state.step, self.watching
        if watching.measures_at(step):
            self.heart.enter("validate")
            with self.window.paused():
                self.measure()
        if watching.logs_at(step):
            self.heart.enter("log")
            self._log()
        if self.digests is not None and digest:
            self.digests.compare({n: (p.tensor, p.placement) for n, p in self.placed().items()}, step=step)
        if showing or saving:  # a pause waits for the device
            with self.window.paused():
                if showing:
                    self.heart.enter("show")
                    self.show(step)
                if saving:
                    self.save(step, last=last)

    def _leave_out(self, batch: Microbatch, verdict: Verdict) -> None:
        """An update that is not made: end the run, go on with the next batch, or go back to the newest checkpoint and on from there
        with the next batch. The samples are named, so that they can be looked at."""
        whole = self.config.train.global_batch
        first = int(batch.position_B[0]) // whole * whole
        step, last, words = self.state.step + 1, first + whole - 1, verdict.words
        self.sinks.event(verdict.alert, step, f"samples {first} to {last}: {words}")
        act: Literal["skip", "roll_back"] = "skip" if verdict.act == "skip" else "roll_back"
        try:
            if verdict.act == "stop":
                raise NonFiniteError(f"step {step}, samples {first} to {last}: {words}: the update was not applied")
            self.guard.left_out(step, first=first, last=last, words=words, act=act)
        except NonFiniteError:
            self.saves.settle()  # of a step that was sound
            raise
        if act == "skip":
            self.progress.message(f"step {step}: left out samples {first} to {last}: {words}")
            return
        with self.window.paused():
            self.saves.settle()
            self.heart.enter("start")  # as long as a start may take
            resumed = self._load()
        if resumed is None:
            raise NonFiniteError(
                f"step {step}, samples {first} to {last}: {words}; there is no checkpoint to go back to"
            )
        self._take(resumed)
        self.guard.skipped[-1]["batches"] = step - resumed.step
        self.saves.start(resumed.step, committed=True)
        self._went_back = True
        self.sinks.rewind(resumed.step)
        self.watching.rewind(resumed.step)
        self.progress.message(
            f"step {step}: back to step {resumed.step}, and on with the samples after {last}: {words}"
        )

    def _load(self) -> Resumed | None:
        """The newest sound checkpoint into the state."""
        return self.saves.manager.resume(self.placed(), objects=("loader", "config"), optional=OBJECTS)

    def _take(self, resumed: Resumed) -> None:
        """The state of a checkpoint whose tensors are loaded; the place in the data is not part of it."""
        self.state.restore_step(resumed.step)
        self.window.load_state_dict(resumed.objects.get("window", {}), first=self.parallel.mesh.dp_rank == 0)

    def measure(self) -> None:
        """The loss on the held-out images, into the record of this step and the checkpoints that follow."""
        assert self.validation is not None
        losses = self.validation.measure()
        self.measured = {"step": self.state.step} | {n: x if math.isfinite(x) else None for n, x in losses.items()}

    def _log(self) -> None:
        """One record for every log interval."""
        c, step = self.config, self.state.step
        taken = step + self.guard.batches_left_out
        self.window.add("train/images", float(taken * c.train.global_batch))
        if self.guard.skipped:
            self.window.add("reliability/skipped", float(len(self.guard.skipped)))
            self.window.add("reliability/roll_backs", float(self.guard.roll_backs))
        self.watching.look()
        record = (
            self.window.flush(self.parallel.reduce, reading=partial(self.watching.read, step)) | self.saves.record()
        )
        record = {name: value for name, value in record.items() if value or not name.startswith("data/bad/")}
        record["perf/goodput"] = self.watching.goodput(step, record["perf/step_s"], since=self.heart.born)
        if self.measured.get("step") == step:
            record |= {f"eval/{name}": value for name, value in self.measured.items() if name != "step"}
        if self.parallel.runtime.rank == 0:
            self.watching.write(Path(c.run), self.ownership)
        self.sinks.committed(self.saves.committed)
        self.sinks.log(step, record)
        self.progress.update(step, record)
        if record["data/substituted"] > 0:
            self.progress.message(
                f"step {step}: {record['data/substituted']:.0f} unreadable samples substituted since the last log step, "
                f"named in {quarantine_path(Path(c.run), dp_rank='*', life=self.ownership.life)}"
            )

    def save(self, step: int, *, last: bool = True) -> None:
        """Commit a checkpoint of the state after `step` updates, unless it is there; `last`: before this returns."""
        self.saves.save(step, tensors=self.placed, objects=self._objects, lineage=self.lineage, last=last)

    def _objects(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        window = self.window.state_dict(self.parallel.reduce)
        return {
            "loader": self.batches.state_dict(None if self._place is None else self._place.mark),
            # Metrics of two tp ranks may differ in a last bit; a checkpoint holds one truth.
            "window": self.parallel.runtime.broadcast_object(window),
            "config": to_dict(self.config),
            "pool": pool_of(self.config, self.parallel.mesh),
            "guard": self.guard.state_dict(),
            "validation": dict(self.measured),
            **met(
                self._place or self.batches.place(),
                self.parallel,
                before={} if self.resumed is None else self.resumed.objects,
            ),
        }

    def show(self, step: int) -> None:
        """Draw the fixed prompts with the averaged weights."""
        if self.drawer is None:
            return
        with self.state.ema.swapped_in() if self.state.ema is not None else nullcontext():
            grid, began = None, time.perf_counter()
            try:
                grid = self.drawer(step)
            except (OSError, StorageError) as error:  # of the one rank that writes, after the ranks' last exchange
                logger.warning("the pictures of step %d cannot be written, training goes on: %s", step, error)
            self.parallel.reshard()
        self.window.add("samples/draw_s", time.perf_counter() - began)
        if grid is not None:
            self.sinks.image(grid, key="samples/grid", step=step, caption=f"step {step}")

    def close(self) -> None:
        """Flush what people see, end the loader's threads and give the run folder free; also after an error."""
        self.heart.also = untold  # a device that failed measures nothing any more
        self.heart.enter("close")
        gc.unfreeze()
        with ExitStack() as last:  # each of them, whatever another meets
            last.callback(self.ownership.release)
            if self.validation is not None:
                last.callback(self.validation.close)
            last.callback(self.batches.close)
            last.callback(self.sinks.close)
            last.callback(lambda: self.sinks.committed(self.saves.committed))
            last.callback(self.progress.close)
            last.callback(self.saves.close)
