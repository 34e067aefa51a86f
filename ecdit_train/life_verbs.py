"""What the verbs about a run's life do: `status`, `stop`, and how many ranks `resume` starts. They read files; no torch."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train import errors, log_verb
from ecdit_train.errors import ConfigError, Problem, RunFolderError
from ecdit_train.run_folder import CHECKPOINTS, RESOLVED, by_step
from ecdit_train.supervise import alert_file, lease, lives, processes, summary
from ecdit_train.supervise.beats import ALONE
from ecdit_train.supervise.lease import BEATS, Holding
from ecdit_train.supervise.verdict import Seen
from launch import job_view
from launch.job_view import JobView

LOOK_SECONDS = 15.0
"""How long `status` waits for the sign of life of an owner on another machine."""
LISTED_LIVES = 5


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run as it stands."""

    state: str
    """One word or a few."""
    lines: tuple[str, ...]
    exit_code: int
    """0: finished, running well, waiting for its turn or not begun; else that of the last life; 86 while a rank is silent for
    too long; 83 while its job waits for what will not come; 1 after an end that nobody noted."""
    goes_on: bool = False
    """Whether it may be another one a moment later."""


STATUS = """whether a run lives, how far it is, who owns it, what its job waits for, and how its lives ended

Exit code, for cron: 0 finished, running well, waiting for its turn in the queue, or not begun; 83 its job waits for what will not
come (held, a dependency that failed); 86 running, and a rank is silent for too long; else that of the last life (75 stopped, to be
resumed), or 1 where it ended without a word."""

HOPELESS = (
    *("BadConstraints", "DependencyNeverSatisfied", "JobHeldAdmin", "JobHeldUser", "launch failed requeued held"),
    *("PartitionNodeLimit", "PartitionTimeLimit"),
)
"""Slurm's reasons of a job that somebody must change or release."""


def declare(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The words of `status`, `stop` and `logs`."""
    p = verb("status", status, STATUS)
    p.add_argument("run", help="run folder")
    p.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again and again while it runs or waits"
    )
    p = verb(
        "stop",
        stop,
        "ask a running run to save and stop, from any machine that sees its folder, and wait until it has; take jobs of it that "
        "wait in the queue out of it",
    )
    p.add_argument("run", help="run folder")
    p.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="wait no longer (default 600)")
    log_verb.declare(verb)


def status(args: argparse.Namespace) -> int:
    run = Path(args.run)
    while True:
        found = look(run)
        print("\n".join(found.lines), flush=True)
        if args.watch is None or not found.goes_on:
            return found.exit_code
        time.sleep(args.watch)
        print()


def look(run: Path) -> Status:
    """Raises RunFolderError where there is no run."""
    if not (run / RESOLVED).exists():
        raise RunFolderError(f"{run} is not a run folder: it has no {RESOLVED}")
    from ecdit_train.config.stored import read_tree
    from ecdit_train.observe.journal import read_records

    tree, records, known = read_tree(run), read_records(run), lives.read(run)
    held = lease.read(run)
    expires = float(tree.get("watch", {}).get("lease", 60.0))
    alive = held is not None and held.mark.token is not None and _lives(run, held, expires=expires)
    ranks = [seen for told in summary.read(run, life=held.mark.epoch).values() for seen in _aged(told)] if held else []
    late = [rank for rank in ranks if alive and rank.beat.seconds > rank.beat.allowed + 2 * summary.SECONDS]
    job = job_view.look(run)
    state, code = _state(known, alive=alive, late=late, job=job)
    there = alive or (job is not None and (job.waits or job.runs))
    total = int(tree["train"]["steps"])
    step = max([int(records[-1]["step"])] if records else [0])
    lines = [f"run         {run} ({tree.get('experiment', '')})", f"state       {state}"]
    lines.append(f"step        {step} of {total} ({100 * step / max(total, 1):.1f} %)")
    if records:
        lines.append(f"training    {_speed(records[-1], left=total - step if alive else 0)}")
    if known and records and (share := _goodput(records, known, until=time.time() if there else None)):
        lines.append(f"goodput     {share}")
    lines.append(f"checkpoint  {_newest_checkpoint(run)}")
    if alerts := alert_file.open_ones(run, life=max((one.number for one in known), default=None)):
        told = "; ".join(
            f"{one['name']} since step {one.get('step', '?')}: {one.get('words', '')}" for one in alerts[-3:]
        )
        lines.append(f"alerts      {told} (docs/runbook)")
    if held is not None and held.owner is not None:
        words = "" if alive else ", which has ended" if lease.is_gone(held.owner) else ", of which nothing is heard"
        lines.append(f"owner       {held.owner}{words}")
    if alive and ranks:
        lines.append(f"ranks       {_ranks(ranks)}")
    if job is not None:
        lines.append(f"job         {job}")
        lines += [f"decided     {words}" for words in job.decisions()]
    for life in known[-LISTED_LIVES:]:
        lines.append(f"life {life.number:<6} {_life(life, run=run)}")
    return Status(state=state, lines=tuple(lines), exit_code=code, goes_on=there)


def _lives(run: Path, held: Holding, *, expires: float) -> bool:
    """Whether the owner of the folder lives; of one that nobody here can ask, a sign of life is waited for."""
    gone = None if held.owner is None else lease.is_gone(held.owner)
    if held.owner is not None and processes.is_alive(held.owner.process) is not None:
        return not gone
    if gone:
        return False
    deadline = time.monotonic() + min(LOOK_SECONDS, 1.5 * expires / BEATS)
    while time.monotonic() < deadline:
        now = lease.read(run)
        if now is not None and now.mark != held.mark:
            return now.mark.token is not None
        time.sleep(0.5)
    return False


def _state(known: list[lives.Life], *, alive: bool, late: list[Seen], job: JobView | None) -> tuple[str, int]:
    if late:
        worst = max(late, key=lambda rank: rank.beat.seconds)
        return f"running, but rank {worst.beat.rank} is silent in {worst.beat}", errors.HangError.exit_code
    if alive:
        return "running", errors.EXIT_OK
    if job is not None and job.state is not None and job.waits:
        from launch.submit import SubmitError

        code = SubmitError.exit_code if job.state.reason in HOPELESS else errors.EXIT_OK
        return f"waits in the queue: job {job}", code
    if job is not None and job.runs:
        return f"between two lives: job {job.number} runs", errors.EXIT_OK
    if not known:
        return "not begun", errors.EXIT_OK
    last = known[-1]
    if not last.ended:
        return "ended without a word (killed, or its machine was lost)", 1
    code = int(last.facts["exit_code"])
    word = {errors.EXIT_OK: "finished", errors.EXIT_REQUEUE: "stopped, to be resumed"}.get(code, "failed")
    return word, code


def _speed(record: dict[str, Any], *, left: int) -> str:
    from ecdit_train.observe.console import describe

    step_s = record.get("perf/step_s")
    eta = step_s * left if step_s is not None and left > 0 else None
    speed = f"  {1 / step_s:.3g} steps/s" if step_s else ""
    return describe(record, eta=eta) + speed


def _goodput(records: list[dict[str, Any]], known: list[lives.Life], *, until: float | None) -> str:
    """The share of the time since the first life began that went into steps that count. `until`: seconds since the epoch; None:
    the last that was noted. Empty where it cannot be said."""
    from ecdit_train.observe.goodput import Useful

    begun = min((float(life.facts["began"]) for life in known if life.facts.get("began")), default=None)
    noted = [float(life.facts.get("time", 0.0)) for life in known] + [float(records[-1].get("time", 0.0))]
    passed = 0.0 if begun is None else (max(noted) if until is None else until) - begun
    useful = Useful()
    for record in records:
        useful.add(int(record.get("step", 0)), record.get("perf/step_s") or 0.0)
    if not (share := useful.share(passed)):
        return ""
    return f"{share:.1%} of the {_ago(passed)} since it began were steps that count; the rest waited, started, saved or was lost"


def _newest_checkpoint(run: Path) -> str:
    committed = [(step, path) for step, path in by_step(run / CHECKPOINTS, suffix="") if path.is_dir()]
    if not committed:
        return "none yet"
    step, path = committed[-1]
    with contextlib.suppress(OSError):
        return f"step {step}, committed {_ago(time.time() - path.stat().st_mtime)} ago"
    return f"step {step}"


def _aged(told: dict[str, Any]) -> list[Seen]:
    """The ranks of one machine. What it told is as old as its clock and ours say; good enough to show."""
    return [rank for rank in summary.ranks_of(told) if not rank.is_over]


def _ranks(ranks: list[Seen]) -> str:
    behind = min(ranks, key=lambda rank: (rank.beat.counter, -rank.beat.seconds))
    text = f"{len(ranks)} alive; last rank {behind.beat.rank} on {behind.host}, in {behind.beat} for {behind.beat.seconds:.1f} s"
    own = {rank.beat.rank: sum(rank.beat.spent.get(phase, 0.0) for phase in ALONE) for rank in ranks}
    slowest = max(ranks, key=lambda rank: own[rank.beat.rank])
    if len(ranks) > 1 and (most := own[slowest.beat.rank]) > 0:
        usual = statistics.median(own.values())
        text += f"; slowest rank {slowest.beat.rank} on {slowest.host}: {most:.3g} s a step by itself (median {usual:.3g} s)"
    return text


def _life(life: lives.Life, *, run: Path) -> str:
    facts = life.facts
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.get("began", 0)))
    ranks = facts.get("ranks", 1)
    host, job = str(facts.get("host", "?")), ""
    if facts.get("job"):
        job = f", Slurm job {facts['job']}"
        more = (job_view.nodes_of(run, job=str(facts["job"]), began=float(facts.get("began") or 0)) or 1) - 1
        host += f" and {more} more host{'s' * (more != 1)}" if more else ""
    where = f"{began}, {ranks} rank{'s' * (ranks != 1)}, {host}{job}"
    steps = f"from step {facts['from_step']}" if "from_step" in facts else "did not begin to train"
    if not life.ended:
        return f"{where}: {steps}"
    to = f" to {facts['step']}" if "step" in facts else ""
    return f"{where}: {steps}{to}, exit code {facts['exit_code']}: {facts.get('why', '')}"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def stop(args: argparse.Namespace) -> int:
    """Ask the owner to save and stop; wait for what comes of it."""
    run = Path(args.run)
    look_at = lease.read(run)
    if look_at is None and not (run / RESOLVED).exists():
        raise RunFolderError(f"{run} is not a run folder: it has no {RESOLVED}")
    if look_at is None or look_at.mark.token is None or (look_at.owner and lease.is_gone(look_at.owner)):
        return _stop_job(run)
    token, owner = look_at.mark.token, look_at.owner
    job_view.take_out(run, but=owner.job if owner else None, say=print)  # else one that comes after it would go on
    if owner is not None and owner.job is not None:  # else its supervisor would start the next life
        job_view.ask_to_stop(run, owner.job)
    lease.ask_to_stop(run, token=token)
    print(f"asked {owner or 'the owner'} to save and stop", flush=True)
    deadline = time.monotonic() + args.timeout
    while time.monotonic() < deadline:
        now = lease.read(run)
        ended = now is None or now.mark.token != token
        if ended or (owner is not None and lease.is_gone(owner)):
            return _came_of(run, life=look_at.mark.epoch)
        time.sleep(0.2)
    print(f"ecdit: it has not stopped within {args.timeout:g} s; it will after the step at work", file=sys.stderr)
    return errors.EXIT_REQUEUE


def _stop_job(run: Path) -> int:
    """No life runs. Jobs may wait in the queue, or one be between two lives."""
    out = job_view.take_out(run, say=print)
    job = job_view.look(run)
    if job is not None and job.runs:
        job_view.ask_to_stop(run, job.number)
        print(f"{run}: job {job.number} is between two lives; it will start no further one")
        return errors.EXIT_OK
    if job is not None and job.waits and job.number not in out:
        print(f"ecdit: job {job} still waits in the queue: scancel {job.number}", file=sys.stderr)
        return errors.EXIT_REQUEUE
    if not out:
        print(f"{run}: nothing runs there")
    return errors.EXIT_OK


def _came_of(run: Path, *, life: int) -> int:
    """Tell how that life ended. 0 when it stopped or finished with everything saved, else its own exit code."""
    for _ in range(20):
        last = next((known for known in lives.read(run) if known.number == life and known.ended), None)
        if last is not None:
            print(f"{last.facts.get('why', '')}: step {last.facts.get('step', '?')}")
            code = int(last.facts["exit_code"])
            return errors.EXIT_OK if code in (errors.EXIT_OK, errors.EXIT_REQUEUE) else code
        time.sleep(0.1)
    print("ecdit: it has ended without a word", file=sys.stderr)
    return 1


def ranks_for(run: Path, words: Sequence[str] = ()) -> int:
    """As many ranks as the run was last trained on, for a `resume` that does not say; 1 where `words` change the layout, as they
    would be wrong about another number.

    Raises ConfigError if this machine has not as many GPUs, or cores where it has no GPU.
    """
    if any(word.startswith("parallel") for word in words):
        return 1
    ranks = next((int(life.facts["ranks"]) for life in reversed(lives.read(run)) if "from_step" in life.facts), None)
    if ranks is None:
        ranks = _fewest(run)
    gpus = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
    have = gpus or os.cpu_count() or 1
    if ranks > have:
        what = f"{have} {'GPU' if gpus else 'core'}{'s' * (have != 1)}"
        rule = f"{run} was trained on {ranks} ranks, and this machine has {what}: say how many (ecdit --nproc N resume RUN)"
        raise ConfigError(Problem(field="--nproc", value=ranks, rule=rule, nearest=have))
    return ranks


def _fewest(run: Path) -> int:
    """The smallest number of ranks that a run's layout covers, for one without a record of its lives."""
    from ecdit_train.config.stored import read_tree

    parallel = read_tree(run).get("parallel", {})
    degrees = {name: int(parallel.get(name, 1)) for name in ("dp_replicate", "dp_shard", "tp", "ep")}
    dense = degrees["dp_replicate"] * max(1, degrees["dp_shard"]) * degrees["tp"]
    return math.lcm(dense, degrees["ep"])
