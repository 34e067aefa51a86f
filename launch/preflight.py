"""Before each life every node is asked what it has (`preflight_task`), and one that is not fit is named."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ecdit_train.errors import EXIT_OK, StorageError
from launch.decide import Ending
from launch.job_file import JobFile
from launch.preflight_task import MARK
from launch.slurm import FIRST_PROBE_SECONDS, PROBE_SECONDS, Slurm

FIRST_SECONDS = 600.0
"""For a node's first answer in this attempt: Slurm may run a prolog before its first step there."""
IMAGE_SECONDS = 1800.0
"""The same where steps run in a container: each node loads the image by itself, and one may have it already."""
OTHERS_SECONDS = 150.0
"""For nodes that have answered before, after the first answer of this round; or three times as long as that one took."""
UNKNOWN = 1


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of one round."""

    facts: Mapping[str, dict[str, Any]]
    """By host; `late`: seconds between a node's clock and ours when its answer came."""
    said: str
    """srun's own words."""


def check(
    job: JobFile, *, hosts: Sequence[str], slurm: Slurm, environ: Mapping[str, str], folder: Path, known: set[str]
) -> Ending:
    """Ending with code 0: all nodes are fit. Else what is wrong, as if it were the end of a life; code 0 too when a warning came.

    Args:
        folder: of this life, on the shared file system.
        known: hosts that have answered in this attempt, which do so quickly; those that answer now are added.
    """
    answers = _ask(job, hosts=hosts, slurm=slurm, environ=environ, folder=folder, known=known)
    silent = [host for host in hosts if host not in answers.facts]
    if silent and not slurm.outside.warned:
        if lost := slurm.silent(silent, seconds=PROBE_SECONDS if known.issuperset(silent) else FIRST_PROBE_SECONDS):
            if set(lost) >= set(hosts):
                return Ending(code=UNKNOWN, why=f"no node runs a program; srun: {answers.said}")
            why = f"{', '.join(lost)} {'do' if len(lost) > 1 else 'does'} not answer"
            return replace(judge(job, answers.facts), code=UNKNOWN, why=why, lost=tuple(lost))
        # They are there: srun itself has failed. Once more.
        answers = _ask(job, hosts=hosts, slurm=slurm, environ=environ, folder=folder, known=known)
        silent = [host for host in hosts if host not in answers.facts]
    if slurm.outside.warned:
        return Ending(code=EXIT_OK)
    if silent:
        if len(silent) == len(hosts):
            return Ending(code=UNKNOWN, why=f"no node answers its checks; srun: {answers.said}")
        bad = tuple((host, "its checks do not end (storage that hangs?)") for host in silent)
        return Ending(code=UNKNOWN, why=_words(bad), bad=bad)
    return judge(job, answers.facts)


def judge(job: JobFile, facts: Mapping[str, dict[str, Any]]) -> Ending:
    """What is wrong with nodes that said this."""
    lates = {host: float(told["late"]) for host, told in facts.items()}
    # Two clocks that differ: ours is the supervisor's. Of more the one that is alone.
    usual = statistics.median(lates.values()) if len(lates) > 2 else 0.0
    wrong = {host: _wrong(job, told, late=lates[host] - usual) for host, told in facts.items()}
    bad = tuple((host, "; ".join(words)) for host, words in wrong.items() if words)
    if not bad:
        return Ending(code=EXIT_OK)
    shared = [told for told in facts.values() if told["missing"] or _is_full(job, told)]
    if len(shared) == len(facts):  # not a node's fault
        return Ending(code=StorageError.exit_code, why=f"on every node: {bad[0][1]}")
    return Ending(code=UNKNOWN, why=_words(bad), bad=bad)


def _wrong(job: JobFile, told: Mapping[str, Any], *, late: float) -> list[str]:
    asked, words = job.preflight, []
    if job.gpu and told.get("gpu_trouble"):
        words.append(str(told["gpu_trouble"]))
    elif job.gpu and told.get("gpus", 0) < asked.gpus:
        words.append(f"{told.get('gpus', 0)} GPUs instead of {asked.gpus}")
    if told["missing"]:
        words.append(f"{', '.join(told['missing'])}: not there, or no access")
    if _is_full(job, told):
        words.append(f"{(told['free'] or 0) / 1e9:.1f} GB free, {asked.free_bytes / 1e9:.1f} GB needed")
    if abs(late) > asked.clock_seconds:
        words.append(f"its clock differs by {late:+.1f} s (at most {asked.clock_seconds:g} s)")
    if not told["missing"] and not (told["sees"] and told["seen"]):
        words.append(f"a file that is renamed in {job.run} is not seen {'from here' if told['sees'] else 'there'}")
    return words


def _is_full(job: JobFile, told: Mapping[str, Any]) -> bool:
    return job.preflight.free_bytes > 0 and (told["free"] or 0) < job.preflight.free_bytes


def _words(bad: Sequence[tuple[str, str]]) -> str:
    shown = "; ".join(f"{host}: {words}" for host, words in bad[:4])
    return shown + (f"; and {len(bad) - 4} more nodes" if len(bad) > 4 else "")


def _ask(
    job: JobFile, *, hosts: Sequence[str], slurm: Slurm, environ: Mapping[str, str], folder: Path, known: set[str]
) -> Answers:
    token = secrets.token_hex(8)
    meeting = folder / f"meeting-{token}"  # a name that comes again may be remembered by a node as what it was
    with contextlib.suppress(OSError):  # a node that cannot see it will say so
        meeting.mkdir(parents=True)
        (meeting / ".supervisor").write_text(token)
        os.replace(meeting / ".supervisor", meeting / "supervisor")
    asked = {"gpu": job.gpu, "folders": job.preflight.folders, "run": job.run, "meeting": str(meeting), "token": token}
    step = [
        *("srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--overlap"),
        *("--kill-on-bad-exit=0", "--wait=0", "--export=ALL", *job.srun),
        *(job.python, "-m", "launch.preflight_task", json.dumps(asked)),
    ]
    process = slurm.outside.start(step, environ=environ, stdout=subprocess.PIPE)
    seconds = IMAGE_SECONDS if any(word.startswith("--container") for word in job.srun) else FIRST_SECONDS
    facts, said = _gather(process, slurm=slurm, hosts=hosts, known=frozenset(known), seconds=seconds)
    known.update(facts)
    for host, told in facts.items():
        with contextlib.suppress(OSError):
            told["seen"] = (meeting / host).read_text() == token
    shutil.rmtree(meeting, ignore_errors=True)
    return Answers(facts=facts, said=said)


def _gather(
    process: subprocess.Popen, *, slurm: Slurm, hosts: Sequence[str], known: frozenset[str], seconds: float
) -> tuple[dict[str, dict[str, Any]], str]:
    """Lines as they come, until all have, srun ends, the time is over or a warning comes. seconds: for all of them; where only
    `known` ones are missing, those have less."""
    assert process.stdout is not None
    facts: dict[str, dict[str, Any]] = {}
    outside, pipe, half, other = slurm.outside, process.stdout.fileno(), b"", ""
    os.set_blocking(pipe, False)
    began, others = outside.now(), float("inf")
    while len(facts) < len(hosts) and not outside.warned:
        if outside.now() - began > seconds or (outside.now() > others and known.issuperset(set(hosts) - facts.keys())):
            break
        over = process.poll() is not None
        with contextlib.suppress(BlockingIOError):
            half += os.read(pipe, 1 << 20)
        *lines, half = half.split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if MARK not in text:
                other = text
                continue
            with contextlib.suppress(ValueError, KeyError):
                told = json.loads(text.partition(MARK)[2])
                if not facts:
                    others = outside.now() + max(OTHERS_SECONDS, 3 * (outside.now() - began))
                facts[told["host"]] = {**told, "late": told["clock"] - time.time(), "seen": False}
        if over:
            break
        outside.listen(0.05)
    if len(facts) < len(hosts) and process.poll() is None:
        process.terminate()
    deadline = outside.now() + 20.0
    while process.poll() is None and outside.now() < deadline:
        outside.listen(0.1)
    if process.poll() is None:
        process.kill()
    process.stdout.close()
    return facts, other or f"exit code {process.wait()}"
