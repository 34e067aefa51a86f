"""The all-reduce bandwidth of a job's nodes before a life, where it is asked for: over all of them, and if that is too little, of
neighbours in pairs, so that the node that both of its neighbours find slow is named.

`python -m launch.bandwidth RANKS NODES` is the node launcher of one such measurement.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

from ecdit_train.errors import EXIT_OK
from launch import local, place
from launch.decide import Ending
from launch.job_file import JobFile
from launch.place import port_of
from launch.slurm import Slurm

MARK = "ecdit-bandwidth "
PROGRAM = "ecdit_train.parallel.bandwidth"
SECONDS = 300.0


def check(job: JobFile, *, hosts: Sequence[str], slurm: Slurm, environ: Mapping[str, str]) -> Ending:
    """Ending with code 0 where all is well, or nothing is asked for, or one rank has nobody to talk to."""
    wanted = job.preflight.bandwidth
    if not wanted or len(hosts) * job.ranks_per_node < 2 or slurm.outside.warned:
        return Ending(code=EXIT_OK)
    whole = _measure(job, hosts=hosts, slurm=slurm, environ=environ, number=0)
    if slurm.outside.warned or (whole is not None and whole >= wanted):
        return Ending(code=EXIT_OK)
    ring = [sorted((n, (n + 1) % len(hosts))) for n in range(len(hosts))] if len(hosts) > 2 else []
    pairs = [(hosts[first], hosts[second]) for first, second in ring]  # in Slurm's order: rank 0 is on the first
    slow: dict[str, int] = {}
    for number, pair in enumerate(pairs, start=1):
        found = _measure(job, hosts=pair, slurm=slurm, environ=environ, number=number)
        if found is None or found < wanted:
            slow |= {host: slow.get(host, 0) + 1 for host in pair}
    said = "does not end" if whole is None else f"moves {whole / 1e9:.2f} GB/s"
    why = f"the all-reduce {said}, and {wanted / 1e9:.2f} GB/s are asked for (cluster.preflight_bandwidth)"
    bad = tuple((host, "slow to both of its neighbours") for host, times in slow.items() if times == 2)
    if bad and len(bad) < len(hosts):
        return Ending(code=1, why=f"{', '.join(host for host, _ in bad)}: {why}", bad=bad)
    return Ending(code=1, why=why)


def _measure(
    job: JobFile, *, hosts: Sequence[str], slurm: Slurm, environ: Mapping[str, str], number: int
) -> float | None:
    """Bytes/s; None if it did not end well in time. `number`: of this measurement, for a port of its own."""
    env = {**environ, "MASTER_ADDR": hosts[0], "MASTER_PORT": str(port_of(slurm.job, life=5000 + number))}
    # Not a life's: what becomes of these ranks is no cause of anything.
    env = {name: value for name, value in env.items() if name not in ("ECDIT_EXIT_FILE", "ECDIT_LIFE")}
    step = [
        *("srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--overlap"),
        *(f"--nodelist={','.join(hosts)}", "--kill-on-bad-exit=1", "--export=ALL", *job.srun),
        *(job.python, "-m", "launch.bandwidth", str(job.ranks_per_node), str(len(hosts))),
    ]
    process = slurm.outside.start(step, environ=env, stdout=subprocess.PIPE)
    deadline = slurm.outside.now() + SECONDS
    while process.poll() is None and slurm.outside.now() < deadline and not slurm.outside.warned:
        slurm.outside.listen(0.2)
    if process.poll() is None:
        process.terminate()
    out, _ = process.communicate()
    lines = [line for line in out.decode(errors="replace").splitlines() if MARK in line]
    return float(lines[0].partition(MARK)[2]) if lines else None


def main(argv: Sequence[str]) -> int:
    ranks, nodes = map(int, argv)
    local.COMMAND = (sys.executable, "-m", PROGRAM)
    return local.run_ranks([], nproc=ranks, place=place.find(nodes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
