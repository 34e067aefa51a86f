"""The trainer's view: save a step, now or beside the training; resume from the newest sound one; keep what policy keeps."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train.checkpoint import folder, restore, store
from ecdit_train.checkpoint.background import Saver, SaverLostError
from ecdit_train.checkpoint.failures import CheckpointDamagedError, together
from ecdit_train.checkpoint.layout import Memo, Value
from ecdit_train.checkpoint.plan import SavePlan
from ecdit_train.checkpoint.retention import Retention
from ecdit_train.errors import CheckpointError, EcditError
from ecdit_train.parallel.runtime import Json, Peers, alone


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A committed step that was passed over, and why."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where the run goes on from; `rejected` steps were newer but damaged and have been set aside."""

    path: Path
    step: int
    objects: dict[str, Any]
    lineage: dict[str, Any]
    """What made it; empty where its writer did not say."""
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A step that is on disk for good, and what it cost on this rank."""

    path: Path
    step: int
    nbytes: int
    blocked: float
    """Seconds that training waited."""
    seconds: float
    """From the request to the commit."""
    told: tuple[str, ...] = ()
    """What a person should hear of it: a saver that was replaced, a copy that did not fit into memory."""


@dataclass(kw_only=True)
class _InFlight:
    begun: store.Save
    since: float
    blocked: float


class CheckpointManager:
    """The checkpoints of the one run that owns `root`. All ranks call its methods together, `writing` aside."""

    def __init__(
        self,
        root: Path | str,
        *,
        comm: Peers | None = None,
        keep: int = 3,
        retention: Retention | None = None,
        replicas: store.Replicas = "refuse",
        saver: Saver | None = None,
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        """`saver`: makes `begin` possible. `still_ours` raises when another job has taken the run; asked before each
        act on the folder that others would see."""
        self.root = Path(root)
        self.comm = comm or alone()
        self.retention = retention or Retention(keep=keep)
        self.replicas = replicas
        self.saver = saver
        self.still_ours = still_ours
        self._plan: SavePlan | None = None
        self._memo = Memo()
        self._home: folder.Home | None = None
        self._flying: _InFlight | None = None
        self._sweeper: threading.Thread | None = None

    def home(self) -> folder.Home | Path:
        """The folder itself, from the first time that rank 0 asks; other ranks only need its name."""
        if self.comm.rank != 0:
            return self.root
        self._home = self._home or folder.Home.make(self.root)
        return self._home

    # --- saving ---------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, *, tensors: Mapping[str, Value], objects: Mapping[str, Json], lineage: Json = None
    ) -> Committed:
        """Commit `step` while training waits, then delete what is no longer kept. Raises as `store.save`; a failed delete raises
        nothing. Nothing may be in flight."""
        assert self._flying is None, "settle the save in flight first"
        start = time.monotonic()
        begun = self._begin(step, tensors=tensors, objects=objects, lineage=lineage)
        report = store.commit(begun, written=lambda: store.write_live(begun), still_ours=self.still_ours)
        took = time.monotonic() - start
        return self._committed(report, blocked=took, seconds=took)

    def begin(
        self, step: int, *, tensors: Mapping[str, Value], objects: Mapping[str, Json], lineage: Json = None
    ) -> Committed | None:
        """Begin to copy `step` into host memory, from where the savers write it; `settle` commits it. No tensor may change before
        `copied` returns. None; or, where a host has no room for the copy, the step as `save` has committed it."""
        assert self._flying is None, "settle the save in flight first"
        assert self.saver is not None
        start = time.monotonic()
        begun = self._begin(step, tensors=tensors, objects=objects, lineage=lineage)

        def copy() -> str:
            try:
                self.saver.start(begun.part, begun.views())  # type: ignore[union-attr]
            except MemoryError as error:
                return str(error)
            return ""

        try:
            refused = [f"rank {rank}: {words}" for rank, words in enumerate(together(self.comm, copy)) if words]
        except EcditError:
            self.saver.close()  # on the ranks where it is at work too: nobody will ask for its answer
            store.abandon(begun)
            raise
        if refused:
            self.saver.close()
            report = store.commit(begun, written=lambda: store.write_live(begun), still_ours=self.still_ours)
            took = time.monotonic() - start
            told = (f"step {step} was saved while training waited: {refused[0]}",)
            return self._committed(report, blocked=took, seconds=took, told=told)
        self._flying = _InFlight(begun=begun, since=start, blocked=time.monotonic() - start)
        return None

    @property
    def in_flight(self) -> int | None:
        """The step that is being written; the same on all ranks."""
        return self._flying.begun.step if self._flying else None

    def copied(self) -> None:
        """Wait until the copy of the step in flight is made, so that its tensors may change; not collective."""
        if self._flying is not None and self.saver is not None:
            start = time.monotonic()
            self.saver.copied()
            self._flying.blocked += time.monotonic() - start

    @property
    def writing(self) -> bool:
        """Whether this rank's part is still being written; never waits."""
        return self._flying is not None and self.saver is not None and self.saver.busy

    def settle(self) -> Committed | None:
        """Commit the step in flight, waiting for savers that still write; None if there is none. A saver
        that was lost is replaced and writes once more from the same memory. Raises as `save`; the step is
        then no longer in flight."""
        flying, self._flying = self._flying, None
        if flying is None:
            return None
        assert self.saver is not None
        waited = time.monotonic()
        told: tuple[str, ...] = ()
        begun = flying.begun
        if lost := [f"rank {r}: {words}" for r, words in enumerate(together(self.comm, self._lost)) if words]:
            told = (f"step {begun.step} is written once more: {'; '.join(lost[:4])}",)
            begun = store.begin_again(begun)
            self._again(begun)
        report = store.commit(begun, written=self.saver.report, still_ours=self.still_ours)
        now = time.monotonic()
        return self._committed(report, blocked=flying.blocked + now - waited, seconds=now - flying.since, told=told)

    def _again(self, begun: store.Save) -> None:
        assert self.saver is not None
        saver = self.saver
        try:
            together(self.comm, lambda: saver.again(begun.part))
        except EcditError:
            saver.close()
            store.abandon(begun)
            raise

    def _lost(self) -> str:
        """Waits for this rank's part; why it has to be written again, or nothing."""
        try:
            self.saver.report()  # type: ignore[union-attr]
        except SaverLostError as error:
            return str(error)
        except Exception:
            return ""  # `commit` raises it on all ranks
        return ""

    def _begin(
        self, step: int, *, tensors: Mapping[str, Value], objects: Mapping[str, Json], lineage: Json
    ) -> store.Save:
        together(self.comm, self._ask)
        begun = store.begin(
            self.home,
            step=step,
            tensors=tensors,
            objects=objects,
            lineage=lineage,
            comm=self.comm,
            replicas=self.replicas,
            plan=self._plan,
            memo=self._memo,
        )
        self._plan = begun.plan
        return begun

    def _ask(self) -> None:
        if self.comm.rank == 0:
            self.still_ours()

    def _committed(
        self, report: store.SaveReport, *, blocked: float, seconds: float, told: Sequence[str] = ()
    ) -> Committed:
        if self.comm.rank == 0:
            self._prune()
        return Committed(
            path=report.path,
            step=report.step,
            nbytes=report.nbytes,
            blocked=blocked,
            seconds=seconds,
            told=tuple(told),
        )

    def _prune(self) -> None:
        """Beside the training, if saves are. Nothing here is worth an error: the step is committed, the next save tries
        again, and whoever lost the folder hears it where all ranks do."""

        def prune() -> None:
            with contextlib.suppress(OSError, EcditError):
                self.still_ours()
                folder.prune(self.root, retention=self.retention)

        if self.saver is None:
            prune()
        elif self._sweeper is None or not self._sweeper.is_alive():
            self._sweeper = threading.Thread(target=prune, name="checkpoint-prune", daemon=True)
            self._sweeper.start()

    def _rest(self) -> None:
        """Until nothing is deleted any more."""
        if self._sweeper is not None:
            self._sweeper.join()

    # --- resuming -------------------------------------------------------------------------------------------------------

    def resume(
        self,
        targets: Mapping[str, Value],
        *,
        skip: Sequence[str] = (),
        objects: Collection[str] | None = None,
        optional: Collection[str] = (),
    ) -> Resumed | None:
        """Load the newest sound step into `targets`; None if nothing was ever committed. Cleans leftovers first.

        A damaged step is passed over for the one before it and then set aside, so that its number can be saved again.
        A step that does not fit raises: older ones would not fit either, and starting over must be a decision. So must
        going on when all are damaged: CheckpointError then lists every reason. What cannot be read just now is neither damaged nor
        passed over: CheckpointUnreadableError. `objects` and `optional` as for `restore.load`.
        """
        rejected: list[Rejected] = []
        for path, step in together(self.comm, self._candidates)[0]:
            try:
                loaded = restore.load(
                    path, targets=targets, comm=self.comm, skip=skip, objects=objects, optional=optional
                )
            except CheckpointDamagedError as error:
                rejected.append(Rejected(step=step, reason=str(error)))
                continue
            together(self.comm, lambda: self._set_aside(rejected))
            self.retention = self.retention.with_verified(loaded.step)
            return Resumed(
                path=loaded.path,
                step=loaded.step,
                objects=loaded.objects,
                lineage=loaded.lineage if isinstance(loaded.lineage, dict) else {},
                rejected=tuple(rejected),
            )
        if rejected:
            reasons = "\n".join(f"step {r.step}: {r.reason}" for r in rejected)
            raise CheckpointError(f"{self.root}: every committed checkpoint is damaged:\n{reasons}")
        return None

    def _candidates(self) -> Json:
        """Rank 0 decides for all: a stale cache elsewhere cannot make ranks load different steps."""
        if self.comm.rank != 0:
            return None
        self._rest()
        self.still_ours()
        if self.root.is_dir():
            self.home()
        folder.clean(self.root)
        return [[str(committed.path), committed.step] for committed in reversed(folder.find(self.root))]

    def _set_aside(self, rejected: Sequence[Rejected]) -> None:
        if self.comm.rank == 0 and rejected:
            self.still_ours()
            for step in rejected:
                folder.set_aside(folder.path_of(self.root, step=step.step))

    def close(self) -> None:
        """Give up what is in flight; its temporary folder goes at the next start."""
        self._flying = None
        self._rest()
        if self.saver is not None:
            self.saver.close()
