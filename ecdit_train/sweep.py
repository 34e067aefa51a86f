"""`-m`: the jobs of a sweep, each a fresh `ecdit` process with a run folder of its own, and the table at the end.

Hydra's sweeper says which jobs there are, one of our launchers (`hydra_plugins/ecdit_launchers.py`) calls back here to start
them. All are composed and validated before the first starts. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecdit_train import atomic, comparison, errors
from ecdit_train.comparison import SWEEP_FILE
from ecdit_train.config import compose
from ecdit_train.config.overrides import parse, plain, quoted
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.run_folder import JOB_SCRIPT, RESOLVED

if TYPE_CHECKING:
    from launch.snapshot import Snapshot
    from launch.submit import Job as Prepared

DIRECTORY = "hydra.sweep.dir"
LAUNCHER = "hydra/launcher"


@dataclass(kw_only=True)
class Job:
    """One combination of a sweep."""

    words: list[str]
    """All words of its command line but `run`."""
    label: list[str]
    """The words in which jobs differ, without signs."""
    run: Path
    config: RunConfig
    explicit: frozenset[str]
    exit_code: int | None = None
    slurm_job: int | None = None


class Sweep:
    """A sweep that is being run; the task that Hydra hands to launchers.

    Args:
        words: the command line's.
        launcher: `local` or `slurm`, unless the words say otherwise.
        config_dir: the user's folder.
        before: arguments of each local job in front of its verb (`--nproc N`).
        options: arguments of each local job behind its verb.
        nproc: ranks of a local job.
        after: Slurm jobs that must have ended well before any of these starts.
        parsable: print nothing but the numbers of the Slurm jobs, `1,2,3`.

    Raises:
        ConfigError: whatever is wrong with any of the jobs; no folder has been made.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        launcher: str,
        config_dir: str | None,
        before: Sequence[str] = (),
        options: Sequence[str] = (),
        nproc: int = 1,
        after: Sequence[str] = (),
        parsable: bool = False,
    ) -> None:
        self.after, self.parsable = tuple(after), parsable
        self.words, self.config_dir = list(words), config_dir
        self.before, self.options = list(before), list(options)
        self.launcher = last_value(words, LAUNCHER) or launcher
        self.world = compose.cluster_world if self.launcher == "slurm" else nproc
        self.jobs: list[Job] = []
        self.stopped = False
        checked = check_each(
            words, compose.expand(words, config_dir=config_dir), world=self.world, config_dir=config_dir
        )
        jobs = [
            bare(job) for job in compose.expand(compose.for_hydra(words, config_dir=config_dir), config_dir=config_dir)
        ]
        self.fixed = set.intersection(*map(set, jobs))
        self.folder = Path(last_value(words, DIRECTORY) or default_folder([c.config for c in checked]))
        self._earlier = comparison.read_sweep(self.folder)["jobs"] if (self.folder / SWEEP_FILE).exists() else []
        for words_of_job, made in zip(jobs, checked, strict=True):
            self._add(words_of_job, made)
        self._refuse_shared_runs()
        self._prepared = self._prepare_all() if self.launcher == "slurm" else {}
        self._began = False
        self.jobs.clear()  # the sweeper decides; this was the check

    def run(self) -> int:
        """Runs or submits every job; 0, or the exit code of the first that failed."""
        words = [w for w in self.words if not w.startswith((f"{LAUNCHER}=", f"{DIRECTORY}="))]
        own = [f"{LAUNCHER}={self.launcher}", f"{DIRECTORY}={quoted(str(self.folder))}"]
        app = compose.open_app(self.words, config_dir=self.config_dir)
        with self._as_it_was():
            app.multirun([*compose.for_hydra(words, config_dir=self.config_dir), *own], self)
        self._write()
        numbers = ",".join(str(job.slurm_job) for job in self.jobs if job.slurm_job is not None)
        print(numbers if self.parsable else f"\n{self.summary()}", flush=True)
        return self._exit_code()

    def __call__(self, _: Any) -> None:
        raise TypeError(f"jobs of ecdit need one of its launchers: {LAUNCHER}=local or {LAUNCHER}=slurm")

    # --- what launchers call -------------------------------------------------------------------------------------------

    def prepare(self, words: Sequence[str]) -> Job:
        """One job as the sweeper worded it, checked again: a searching sweeper makes words of its own."""
        made = compose.configure([*bare(words), *self._searchpath()], world=self.world, config_dir=self.config_dir)
        job = self._add(bare(words), made)
        self._refuse_shared_runs()
        return job

    def run_here(self, job: Job) -> float | None:
        """Trains one job in a process of its own, unless it is done; its final loss."""
        from launch.local import run_command

        number = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {' '.join(job.label)}"
        if self.stopped:
            return None
        if (self._before(job).get("exit_code") == 0) and (job.run / RESOLVED).exists():
            print(f"{number}: done before, {job.run}", flush=True)
            job.exit_code = 0
        else:
            print(f"{number}: {job.run}", flush=True)
            ended = run_command(
                [*self.before, "train", *self.options, *job.words, *self._searchpath(), f"run={quoted(str(job.run))}"]
            )
            job.exit_code, self.stopped = ended.code, ended.stopped
            if ended.code:
                print(f"{number}: ended with exit code {ended.code}", file=sys.stderr, flush=True)
        self._write()
        final = comparison.final_loss(job.run)
        return None if final is None else final.loss

    def submit(self, job: Job) -> None:
        """Submits one job to Slurm with the script and the requeue of `ecdit launch`."""
        from launch import submit

        if earlier := self._before(job).get("slurm_job"):
            job.slurm_job, told = (
                earlier,
                f"job {earlier} submitted before: {job.run}; again: sbatch {job.run / JOB_SCRIPT}",
            )
        else:
            config, ready = replace(job.config, run=str(job.run)), self._prepared.pop(str(job.run), None)
            if ready is None or ready.cfg != config:
                ready = submit.prepare(config, allow=job.explicit, after=self.after)
            made = submit.send(ready, after=self.after)
            job.slurm_job, told = made.job, made.text()
        if not self.parsable:
            print(told, flush=True)
        self._write()

    # --- jobs and their folders ----------------------------------------------------------------------------------------

    def _add(self, words: Sequence[str], made: compose.Overridden) -> Job:
        rest = [w for w in words if w.partition("=")[0] != "run"]
        label = [w for w in rest if w not in self.fixed] or ["all"]
        if "run" in made.explicit:
            run = Path(made.config.run)
        else:
            run = self.folder / folder_name(label)
        job = Job(words=rest, label=label, run=run, config=made.config, explicit=made.explicit)
        self.jobs.append(job)
        return job

    def _searchpath(self) -> list[str]:
        return [w for w in self.words if w.lstrip("+").startswith("hydra.searchpath=")]

    def _refuse_shared_runs(self) -> None:
        seen: dict[str, Job] = {}
        for job in self.jobs:
            other = seen.setdefault(str(job.run.absolute()), job)
            if other is not job:
                two = f"{' '.join(other.label)}; {' '.join(job.label)}"
                rule = f"is the run folder of two jobs ({two}): leave run out, or let it differ"
                near = f"{DIRECTORY}={_word_value(str(job.run))}"
                raise ConfigError(Problem(field="run", value=str(job.run), rule=rule, nearest=near))

    def _prepare_all(self) -> dict[str, Prepared]:
        """Run folder -> what will be submitted. Raises what `submit.prepare` does, or ConfigError with every problem of any job."""
        from launch import submit

        ready: dict[str, Prepared] = {}
        problems: dict[str, Problem] = {}
        copies: dict[str, Snapshot] = {}  # one in memory, not one for each job
        for job in self.jobs:
            if not self._before(job).get("slurm_job"):
                config = replace(job.config, run=str(job.run))
                made = submit.prepare(config, allow=job.explicit, after=self.after)
                problems |= {str(p): p for p in made.problems}
                ready[str(job.run)] = replace(made, snapshot=copies.setdefault(made.snapshot.id, made.snapshot))
        if problems:
            raise ConfigError(list(problems.values()))
        return ready

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Hydra writes into the sweep's folder before any launcher is asked: taken back where no job began."""
        file = self.folder / "multirun.yaml"
        content = file.read_bytes() if file.exists() else None
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if not self._began and content is not None:
                    atomic.write(file, content)
                elif not self._began:
                    file.unlink()
                    for path in missing:
                        path.rmdir()
            raise

    def _before(self, job: Job) -> dict[str, Any]:
        """What `sweep.json` of an earlier start says about a job; empty where it says nothing."""
        return next((e for e in self._earlier if e["words"] == job.label and e.get("all_words") == job.words), {})

    # --- results -------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        lines = [comparison.text(comparison.table(self._named())), "", f"sweep folder: {self.folder}"]
        if self.launcher == "slurm":
            return f"{len(self.jobs)} jobs submitted; when they have run: ecdit compare {self.folder}"
        failed = [j for j in self.jobs if j.exit_code not in (0, errors.EXIT_REQUEUE, None)]
        lines += [f"exit code {j.exit_code}: {' '.join(j.label)}, {j.run}" for j in failed]
        unfinished = [j for j in self.jobs if j.exit_code in (None, errors.EXIT_REQUEUE)]
        if failed or unfinished:
            lines.append(
                f"{len(failed)} failed, {len(unfinished)} not finished; the same command goes on if it also says"
            )
            lines.append(f"  {DIRECTORY}={_word_value(str(self.folder))}")
        return "\n".join(lines)

    def _named(self) -> list[tuple[str, Path]]:
        return [(comparison.combination(job.label), job.run) for job in self.jobs]

    def _write(self) -> None:
        self._began = True
        jobs = [
            {
                "words": job.label,
                "all_words": job.words,
                "run": _relative(job.run, self.folder),
                "exit_code": job.exit_code,
                "slurm_job": job.slurm_job,
            }
            for job in self.jobs
        ]
        content = {"words": self.words, "jobs": jobs, "table": comparison.as_json(comparison.table(self._named()))}
        atomic.write(self.folder / SWEEP_FILE, (json.dumps(content, indent=1) + "\n").encode())

    def _exit_code(self) -> int:
        codes = [job.exit_code for job in self.jobs if job.exit_code]
        failed = [code for code in codes if code != errors.EXIT_REQUEUE]
        return next(iter([*failed, *codes]), errors.EXIT_REQUEUE if self.stopped else errors.EXIT_OK)


def check_each(
    words: Sequence[str],
    jobs: Sequence[Sequence[str]],
    *,
    world: int | Callable[[RunConfig], int] | None,
    config_dir: str | None,
) -> list[compose.Overridden]:
    """Every job composed and validated; one ConfigError with what is wrong with any of them, each problem once."""
    own = [w for w in words if w.lstrip("+~").startswith(("hydra.", "hydra/"))]
    problems: dict[str, Problem] = {}
    made = []
    for job in jobs:
        try:
            made.append(compose.configure([*job, *own], world=world, config_dir=config_dir))
        except ConfigError as error:
            if not error.problems:
                raise
            problems |= {str(p): p for p in error.problems}
    if problems:
        raise ConfigError(list(problems.values()))
    return made


def each(words: Sequence[str], verb: Callable[[list[str]], int], *, config_dir: str | None) -> int:
    """Runs a verb that only looks, for every combination of the words, in this process."""
    jobs = compose.expand(words, config_dir=config_dir)
    check_each(words, jobs, world=None, config_dir=config_dir)
    own = [w for w in words if w.startswith("hydra.searchpath=")]
    worst = errors.EXIT_OK
    for job in jobs:
        print(f"# {' '.join(job)}", flush=True)
        worst = max(worst, verb([*job, *own]))
    return worst


def bare(words: Sequence[str]) -> list[str]:
    """Without the `++` that Hydra is given, which means the same to a command."""
    return [w.removeprefix("++") for w in words]


def default_folder(configs: Sequence[RunConfig]) -> str:
    names = list(dict.fromkeys(config.experiment for config in configs))
    return f"runs/sweeps/{names[0] if len(names) == 1 else 'sweep'}-{time.strftime('%Y%m%d-%H%M%S')}"


def folder_name(label: Sequence[str]) -> str:
    """`moe-dense+train.seed-1`: needs no quotes as `run=...`, is the same in every start, and differs where the words do."""
    text = "+".join(label)
    name = re.sub(r"[^\w.+-]+", "-", text)
    if re.sub("=", "-", text) == name and len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def last_value(words: Sequence[str], key: str) -> str | None:
    """The text that the last word about a key gives it."""
    found = [parsed for w in words if (parsed := parse(w)) is not None and parsed.key_or_group == key]
    return str(plain(found[-1])) if found else None


def _word_value(text: str) -> str:
    parsed = parse(f"x={text}")
    return text if parsed is not None and not parsed.is_sweep_override() and plain(parsed) == text else quoted(text)


def _relative(run: Path, folder: Path) -> str:
    """Relative where the run lies inside the sweep, so that the sweep may be moved."""
    run, folder = run.absolute(), folder.absolute()
    return str(run.relative_to(folder)) if run.is_relative_to(folder) else str(run)
