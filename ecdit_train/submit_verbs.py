"""What the verbs that hand jobs to Slurm do: `launch` a run, `submit` one command of ours. They read files; no torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ecdit_train import errors
from ecdit_train.config.resolve import declarations_only
from ecdit_train.errors import ConfigError, Problem, RunFolderError
from ecdit_train.run_folder import RESOLVED

LAUNCH = """check a run against the cluster, freeze its configuration and code in its folder, submit it with sbatch

  ecdit launch experiment=ec_dit_m_64e cluster=h100_ib400 cluster.nodes=8 run=/scratch/m64e --render-only"""

SUBMIT = """run one command of ours as a Slurm job on one node: words about the cluster, then the command

  ecdit submit cluster=h100_ib400 --array 8 data shapes out=data/shapes count=1000000
  ecdit submit cluster=h100_ib400 cluster.time_limit=01:00:00 --after 4711 evaluate run=runs/xl_8e
  ecdit submit cluster=h100_ib400 -- sample run=runs/xl_8e prompts=@prompts.txt"""

OURS = {
    **dict.fromkeys(("train", "resume", "launch"), "ecdit launch trains a run: it comes back by itself"),
    **dict.fromkeys(("submit", "status", "stop", "logs"), "is about jobs, and runs here"),
}
"""Verbs that are no job of their own -> why."""


def declare(
    verb: Callable[..., argparse.ArgumentParser],
    *,
    composes: Callable[[argparse.ArgumentParser], None],
    words: Callable[[argparse.ArgumentParser], None],
) -> None:
    """The words of `launch` and `submit`."""
    p = verb("launch", launch, LAUNCH)
    composes(p)
    _chain(p)
    p = verb("submit", submit, SUBMIT)
    words(p)
    _chain(p)
    p.add_argument(
        "--nproc",
        dest="each",
        type=int,
        metavar="N",
        help="ranks of a verb that draws, with a GPU each (default 1), or GPUs for doctor to look at; other verbs get none",
    )
    p.add_argument("--array", type=int, metavar="N", help="as N tasks beside each other, each told its `--part`")
    p.add_argument("--folder", metavar="DIR", help="for script, code and log (default runs/jobs/VERB-TIME)")


def _chain(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--render-only",
        action="store_true",
        help="print all that would be submitted and why it would be refused; write and submit nothing",
    )
    p.add_argument(
        "--after",
        type=_jobs,
        default=(),
        metavar="JOB[,JOB]",
        help="start when these jobs have ended well (afterok); if one fails, Slurm takes this one out",
    )
    p.add_argument("--parsable", action="store_true", help="print the job's number only, for the --after of the next")


def declare_part(p: argparse.ArgumentParser) -> None:
    """For verbs that several processes may do together."""
    p.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="do every N-th shard from the I-th on, beside other processes that do the rest (`ecdit submit --array N`)",
    )


def _part(text: str) -> Any:
    from data_pipeline.parts import Part

    try:
        return Part.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _jobs(text: str) -> tuple[str, ...]:
    numbers = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"\d+(_\d+)?", number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not JOB[,JOB]: numbers as sbatch prints them, as 4711,4712")
    return numbers


# --- launch ---------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose
    from launch import submit

    with declarations_only():
        made = compose.configure(args.overrides, world=compose.cluster_world, config_dir=args.config_dir)
        if not args.render_only:
            done = submit.launch(made.config, allow=made.explicit, after=args.after)
            print(done.job if args.parsable else done.text())
            return errors.EXIT_OK
        job = submit.compose_job(made.config, after=args.after)
    _show(job, after=args.after)
    return errors.EXIT_OK


def _show(job: Any, *, after: Sequence[str]) -> None:
    print(job.text(), end="", flush=True)
    waits = [f"would start when {', '.join(after)} have ended well"] if after else []
    for line in [*waits, *job.notes, *(f"would be refused: {problem}" for problem in job.problems)]:
        print(f"ecdit: {line}", file=sys.stderr)


# --- submit ---------------------------------------------------------------------------------------------------------


def split(line: Sequence[str]) -> tuple[list[str], list[str]]:
    """What `ecdit submit` itself is told, and what follows its `--`."""
    if line[:1] != ["submit"] or "--" not in line:
        return list(line), []
    at = list(line).index("--")
    return list(line[:at]), list(line[at + 1 :])


def read_line(args: argparse.Namespace, after: list[str], *, parser: argparse.ArgumentParser) -> None:
    """For `submit`: the command, which begins at the first word that sets nothing, read as it will be on the node."""
    if args.verb is not submit:
        return
    words = args.overrides
    at = next((n for n, word in enumerate(words) if "=" not in word and not word.startswith("~")), len(words))
    args.overrides, args.line = words[:at], [*words[at:], *after]
    if not args.line:
        parser.error("submit: which command? as in: ecdit submit cluster=h100_ib400 evaluate run=RUN")
    if (why := OURS.get(args.line[0])) is not None:
        parser.error(f"submit {args.line[0]}: {why}")
    if args.line[0].startswith("-"):
        parser.error(f"submit {args.line[0]}: the verb first; ranks of one that draws: ecdit submit --nproc N ...")
    args.inner = parser.parse_args(args.line)


def submit(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose
    from ecdit_train.config.overrides import parse
    from launch import submit as submission
    from launch import submit_task

    parsed = [(word, parse(word)) for word in args.overrides]
    foreign = [w for w, p in parsed if p is not None and not re.match(r"(cluster|hydra)\b", p.key_or_group)]
    if foreign:
        rule = "is not about the cluster; words of the command come after its verb"
        raise ConfigError([Problem(field=w.partition("=")[0], value=w.partition("=")[2], rule=rule) for w in foreign])
    with declarations_only():
        made = compose.configure(cluster_words(args), config_dir=args.config_dir)
        task = _task(args)
        folder = Path(args.folder) if args.folder else task.folder()
        if not args.render_only:
            submission.need_sbatch(f"run it here: ecdit {task.line[0]} ...")
        named = frozenset(p.key_or_group for _, p in parsed if p is not None)  # not what the cluster's file says
        job = submit_task.compose_task(made.config, task, named=named, folder=folder)
        if args.render_only:
            _show(job, after=args.after)
            return errors.EXIT_OK
        done = submit_task.submit_task(job, task)
    print(done.job if args.parsable else done.text())
    return errors.EXIT_OK


def cluster_words(args: argparse.Namespace) -> list[str]:
    """What the configuration is made of. Only a study is warned before the time limit; a lead that is made for saving a training
    would forbid short jobs."""
    said = any(word.startswith("cluster.signal_lead=") for word in args.overrides)
    return [*args.overrides, *([] if said or args.line[0] == "study" else ["cluster.signal_lead=30"])]


def _task(args: argparse.Namespace) -> Any:
    """The command as a job. Raises ConfigError, RunFolderError."""
    from launch.submit_task import Task

    inner, line = args.inner, args.line
    name = "-".join([word for word in line if re.fullmatch(r"[a-z]+", word)][:2] if _has_verbs(line) else line[:1])
    if getattr(inner, "config_dir", None):
        rule = "comes before the verb: it is copied with the code"
        raise ConfigError(Problem(field="--config-dir", value=inner.config_dir, rule=rule))
    if args.array is not None and (not hasattr(inner, "part") or inner.part or args.array < 1):
        rule = (
            "must be 1 or more"
            if args.array < 1
            else "says the parts itself: leave --part out"
            if getattr(inner, "part", None)
            else f"{name} cannot be cut into parts; data shapes, data index and data verify can"
        )
        raise ConfigError(Problem(field="--array", value=args.array, rule=rule))
    looks = name == "doctor"
    if args.each is not None and (args.each < 1 or not (inner.ranks or looks)):
        rule = f"is for verbs that draw and for doctor, not for {name}" if args.each >= 1 else "must be 1 or more"
        raise ConfigError(Problem(field="--nproc", value=args.each, rule=rule))
    _refuse_missing(line, after=args.after)
    return Task(
        line=tuple(line),
        name=name,
        gpus=args.each or int(inner.ranks),
        ranks=inner.ranks,
        takes_config_dir=hasattr(inner, "config_dir"),
        parts=args.array,
        after=args.after,
    )


def _has_verbs(line: Sequence[str]) -> bool:
    """Whether the first word is a group, as in `data shapes`."""
    return line[0] in ("data", "ckpt", "config", "study")


def _refuse_missing(line: Sequence[str], *, after: Sequence[str]) -> None:
    """What a command reads must be there, unless a job before it makes it."""
    for word in line[1:]:
        name, _, run = word.partition("=")
        if name == "run" and not after and not (Path(run) / RESOLVED).exists():
            raise RunFolderError(
                f"{run} is not a run folder: it has no {RESOLVED}; if a job makes it first: --after JOB"
            )
