"""The all-reduce bandwidth of a job's nodes before a life, where it is asked for: over all of them, and if that is too little, of
neighbours in pairs, so that the node that both of its neighbours find slow is named.

`python -m launch.bandwidth RANKS NODES` is the node launcher of one such measurement.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO

from ecdit_train.errors import EXIT_OK
from launch import local, place
from launch.decide import Ending
from launch.job_file import JobFile
from launch.place import port_of
from launch.slurm import Slurm

MARK = "ecdit-bandwidth "
PROGRAM = "ecdit_train.parallel.bandwidth"
SECONDS = 300.0
END_SECONDS = 30.0
"""For srun to end a measurement that takes too long."""


def check(job: JobFile, *, hosts: Sequence[str], slurm: Slurm, environ: Mapping[str, str]) -> Ending:
    """Ending with code 0 where all is well, or nothing is asked for, or one rank has nobody to talk to."""
    wanted = job.preflight.bandwidth
    if not wanted or len(hosts) * job.ranks_per_node < 2 or slurm.outside.warned:
        return Ending(code=EXIT_OK)
    (whole,) = _measure(job, groups=[tuple(hosts)], slurm=slurm, environ=environ, first=0)
    if slurm.outside.warned or (whole is not None and whole >= wanted):
        return Ending(code=EXIT_OK)
    slow: dict[str, int] = {}
    for number, pairs in enumerate(_rounds(hosts), start=1):
        if slurm.outside.warned:
            break
        measured = _measure(job, groups=pairs, slurm=slurm, environ=environ, first=number * len(hosts))
        for pair, found in zip(pairs, measured, strict=True):
            if found is None or found < wanted:
                slow |= {host: slow.get(host, 0) + 1 for host in pair}
    if slurm.outside.warned:
        return Ending(code=EXIT_OK)
    said = "does not end" if whole is None else f"moves {whole / 1e9:.2f} GB/s"
    why = f"the all-reduce {said}, and {wanted / 1e9:.2f} GB/s are asked for (cluster.preflight_bandwidth)"
    bad = tuple((host, "slow to both of its neighbours") for host, times in slow.items() if times == 2)
    if bad and len(bad) < len(hosts):
        return Ending(code=1, why=f"{', '.join(host for host, _ in bad)}: {why}", bad=bad)
    return Ending(code=1, why=why)


def _rounds(hosts: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Neighbours of a ring in pairs, in Slurm's order (rank 0 is on the first); those of a round share no node."""
    size = len(hosts)
    pairs = [sorted((n, (n + 1) % size)) for n in range(size)] if size > 2 else []
    rounds: list[list[tuple[str, ...]]] = [[], [], []]
    for number, (first, second) in enumerate(pairs):
        # Of an odd ring the last pair meets both kinds of others.
        rounds[2 if size % 2 and number == size - 1 else number % 2].append((hosts[first], hosts[second]))
    return [found for found in rounds if found]


def _measure(
    job: JobFile, *, groups: Sequence[tuple[str, ...]], slurm: Slurm, environ: Mapping[str, str], first: int
) -> list[float | None]:
    """Bytes/s of each group of hosts, which share none and are measured at once; None: it did not end well in time. first: number
    of the first group, for a port of its own."""
    outside = slurm.outside
    with contextlib.ExitStack() as stack:
        # Into files: a pipe that nobody reads would block ranks that say much (NCCL_DEBUG).
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in groups]
        steps = [
            outside.start(
                _step(job, group), environ=_environ(environ, group, job=slurm.job, number=n), stdout=f.fileno()
            )
            for n, (group, f) in enumerate(zip(groups, said, strict=True), start=first)
        ]
        for seconds, then in ((SECONDS, subprocess.Popen.terminate), (END_SECONDS, subprocess.Popen.kill)):
            deadline = outside.now() + seconds
            while any(step.poll() is None for step in steps) and outside.now() < deadline:
                if outside.warned and seconds == SECONDS:
                    break
                outside.listen(0.2)
            for step in steps:
                if step.poll() is None:
                    then(step)
        for step in steps:
            step.wait()
        return [_found(file) for file in said]


def _step(job: JobFile, hosts: tuple[str, ...]) -> list[str]:
    return [
        *("srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--overlap"),
        *(f"--nodelist={','.join(hosts)}", "--kill-on-bad-exit=1", "--export=ALL", *job.srun),
        *(job.python, "-m", "launch.bandwidth", str(job.ranks_per_node), str(len(hosts))),
    ]


def _environ(environ: Mapping[str, str], hosts: tuple[str, ...], *, job: str, number: int) -> dict[str, str]:
    # Not a life's: what becomes of these ranks is no cause of anything.
    env = {name: value for name, value in environ.items() if name not in ("ECDIT_EXIT_FILE", "ECDIT_LIFE")}
    return env | {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(port_of(job, life=5000 + number))}


def _found(file: IO[bytes]) -> float | None:
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if MARK in line]
    with contextlib.suppress(ValueError):  # ranks that are killed may leave half a line
        return float(lines[0].partition(MARK)[2]) if lines else None
    return None


def main(argv: Sequence[str]) -> int:
    ranks, nodes = map(int, argv)
    local.COMMAND = (sys.executable, "-m", PROGRAM)
    return local.run_ranks([], nproc=ranks, place=place.find(nodes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
