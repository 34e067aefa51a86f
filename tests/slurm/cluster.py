"""A real Slurm on one machine: slurmctld, munge and nodes that are namespaces, without systemd, a database or cgroups.

    with Cluster(nodes=4) as cluster:
        job = cluster.submit("job.sh")
        cluster.wait(job, "RUNNING")
        cluster.kill_node("n2")

The controller and each node have a network of their own, joined by a bridge (10.77.0.0/24, nothing of it on the machine's own
network), so ports are free, clusters can live beside each other, and a cable can be pulled. All files lie in one temporary folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import TracebackType

import machines
from machines import Machine, Process, until

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
SUBNET = "10.77.0"
CONF = Template((Path(__file__).parent / "slurm.conf.template").read_text(encoding="utf-8"))

ETC = """hostname "$0"
mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/nsswitch" /etc/nsswitch.conf; mount -t tmpfs shm /dev/shm
ip link set lo up"""
"""Own host names, own shared memory, and no DNS: without a route each reverse look-up would take 5 s."""
# A bridge without an address of its own takes one of its cables': the others lose the controller for a while when that one goes.
CONTROLLER = f"""{ETC}
ip link add br0 address 02:77:00:00:01:00 type bridge forward_delay 0; ip addr add {SUBNET}.1/24 dev br0; ip link set br0 up
munged --foreground --force --num-threads=2 --key-file="$1/munge/key" --socket="$1/munge/socket" --pid-file="$1/munge/pid" \\
  --log-file="$1/log/munged" --seed-file="$1/munge/seed" &
until [ -S "$1/munge/socket" ]; do sleep 0.02; done
slurmctld -D -c -f "$1/slurm.conf" &
while :; do wait -n || sleep 1; done"""
NODE = f"""{ETC}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; ip addr add "$2/24" dev eth0; ip link set eth0 up
slurmd -D -f "$1/slurm.conf" -N "$0" &
while :; do wait -n || sleep 1; done"""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `scontrol show job` says."""

    id: int
    state: str
    reason: str
    restarts: int
    exit_code: int
    signal: int
    batch_host: str | None
    """None while it waits."""
    nodes: tuple[str, ...]
    minutes: int
    """That it has run, rounded down."""


class Cluster:
    """Made by `up`, or by a `with` block; the folder and all processes are gone after `down`."""

    def __init__(self, *, nodes: int = 4, slurmd_timeout: int = 300, extra: str = "") -> None:
        """
        Args:
            slurmd_timeout: seconds without an answer after which Slurm calls a node down; 300 is Slurm's default.
            extra: further lines of slurm.conf.
        """
        self.names = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 107 bytes
        self._write(slurmd_timeout=slurmd_timeout, extra=extra)
        self._controller: Machine | None = None
        self._nodes: dict[str, Machine] = {}

    @staticmethod
    def not_possible() -> str | None:
        """Why there can be no cluster on this machine; None where there can."""
        if lacking := machines.missing(DAEMONS):
            return f"{', '.join(lacking)} not found: make slurm-deps"
        return machines.not_possible()

    def __enter__(self) -> Cluster:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # --- its life -----------------------------------------------------------------------------------------------------

    def up(self) -> Cluster:
        """Returns when all nodes are idle."""
        try:
            self._controller = Machine(
                "ctl", script=CONTROLLER, words=[str(self.folder)], log=self._log("ctl"), own_proc=False
            )
            # Clients and slurmd back off for seconds when they come before the controller listens.
            until(lambda: self._try("scontrol", "ping").stdout.count("UP"), what="slurmctld", seconds=30, every=0.05)
            for name in self.names:
                self.start_node(name)
            self.wait_idle(seconds=30)
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        for wait in (False, True):
            for machine in self._machines():
                machine.power_off(wait=wait)
        self._nodes, self._controller = {}, None
        shutil.rmtree(self.folder, ignore_errors=True)

    def reset(self) -> None:
        """Back to a calm cluster: no jobs, all cables in, all nodes on and idle."""
        self.exec("scancel", "--full", "--user=root")
        for name in self.names:
            if name in self._nodes:
                self.link(name, up=True)
            else:
                self.start_node(name)
            self._try("scontrol", "update", f"nodename={name}", "state=resume")  # refused for nodes that need none
        try:
            self.wait_idle(seconds=20)
        except AssertionError:
            # Processes that left their step (setsid, then orphaned) are unknown to Slurm and hold their node.
            for name in set(self.names) - self.idle():
                self.kill_node(name)
                self.start_node(name)
            self.wait_idle(seconds=60)

    # --- clients ------------------------------------------------------------------------------------------------------

    def exec(self, *command: str | os.PathLike[str], env: dict[str, str] | None = None, seconds: float = 120.0) -> str:
        """A command on the login node (here: the controller's) that must succeed; its standard output."""
        done = self._try(*command, env=env, seconds=seconds)
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *command: str | os.PathLike[str], env: dict[str, str] | None = None, seconds: float = 120.0,
                ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """A command there that may fail."""
        return self._try(*command, env=env, seconds=seconds)

    def submit(self, *arguments: str | os.PathLike[str]) -> int:
        """`sbatch` with these arguments; the job's number."""
        return int(self.exec("sbatch", "--parsable", *arguments))

    def job(self, number: int) -> Job:
        said = self.exec("scontrol", "show", "job", "-o", str(number))
        facts = dict(re.findall(r"(?:^| )(\w+)=(\S*)", said))
        code, _, killed_by = facts["ExitCode"].partition(":")
        hours, minutes, _ = facts["RunTime"].rpartition("-")[2].split(":")
        return Job(
            id=number, state=facts["JobState"], reason=facts["Reason"], restarts=int(facts["Restarts"]),
            exit_code=int(code), signal=int(killed_by), batch_host=facts.get("BatchHost"),
            nodes=self._hosts(facts.get("NodeList", "")), minutes=int(hours) * 60 + int(minutes),
        )  # fmt: skip

    def wait(self, number: int, *states: str, seconds: float = 120.0) -> Job:
        """Until the job is in one of these states. AssertionError when it takes too long, or ends in another one."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).state not in states:
            where = f"job {number} is {job}, not {' or '.join(states)}\n{self.said(number)}"
            assert time.monotonic() < deadline, where
            assert job.state not in ENDED or job.restarts or set(states) & set(ENDED) == set(), where
            time.sleep(0.1)
        return job

    def said(self, number: int) -> str:
        """The end of a job's output, for messages."""
        path = re.search(r" StdOut=(\S+)", self.exec("scontrol", "show", "job", "-o", str(number)))
        file = Path(path[1]) if path else Path("/dev/null")
        return file.read_text(errors="replace")[-4000:] if file.is_file() else ""

    def idle(self) -> set[str]:
        return set(
            self.exec("sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N %t").split()[
                ::2
            ]
        )

    def wait_idle(self, *, seconds: float) -> None:
        """Until Slurm calls all nodes idle and no process of a job is left on any."""

        def calm() -> bool:
            said = self._try("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t").stdout.split()
            if dict(zip(said[::2], said[1::2], strict=True)) != dict.fromkeys(self.names, "idle"):
                return False
            return not any("SLURM_JOB_ID" in process.env for name in self.names for process in self.processes_of(name))

        until(calm, what="all nodes to be idle", seconds=seconds, every=0.1)

    # --- what can happen ----------------------------------------------------------------------------------------------

    def start_node(self, name: str) -> None:
        """Power on, with its cable in."""
        assert name not in self._nodes, f"{name} is on"
        number = self.names.index(name) + 1
        address = f"{SUBNET}.{10 + number}"
        node = Machine(name, script=NODE, words=[str(self.folder), address], log=self._log(name), own_proc=True)
        self._nodes[name] = node
        # A fixed hardware address: a node that comes back must not meet its old one in its neighbours' tables.
        hardware = f"02:77:00:00:00:{number:02x}"
        wire = f"ip link add v{name} type veth peer name eth0 address {hardware} netns {node.first}"
        self._on_controller(*wire.split())
        self._on_controller("ip", "link", "set", f"v{name}", "master", "br0", "up")

    def kill_node(self, name: str) -> None:
        """Power loss: slurmd, steps and ranks are gone at once, nobody answers."""
        self._nodes.pop(name).power_off()
        until(lambda: self._gone(f"v{name}"), what=f"the cable of {name} to go", seconds=10)

    def link(self, name: str, *, up: bool) -> None:
        """The node's cable; its processes live on without it."""
        self._on_controller("ip", "link", "set", f"v{name}", "up" if up else "down")

    def drain(self, name: str, *, reason: str = "drill") -> None:
        self.exec("scontrol", "update", f"nodename={name}", "state=drain", f"reason={reason}")

    def on(self) -> set[str]:
        """Nodes with power."""
        return set(self._nodes)

    def processes_of(self, name: str) -> list[Process]:
        return self._nodes[name].processes()

    def freeze(self, name: str, program: str, *, thaw: bool = False) -> None:
        """SIGSTOP for a program of a node (SIGCONT with `thaw`), as when a machine answers nobody for a while."""
        found = [p for p in self.processes_of(name) if p.words and p.words[0] == program]
        assert found, f"no {program} on {name}"
        for process in found:
            process.kill(signal.SIGCONT if thaw else signal.SIGSTOP)

    def all_pids(self) -> list[int]:
        """Of every process of the cluster."""
        return [process.pid for machine in self._machines() for process in machine.processes()]

    def runs(self, name: str, word: str) -> bool:
        """Whether a process of the node has this word on its command line."""
        return any(word in process.words for process in self.processes_of(name))

    def ranks_of(self, name: str) -> list[Process]:
        """A node's ranks (`RANK` in `env`), without the processes that ranks start."""
        found = [p for p in self.processes_of(name) if "RANK" in p.env and "resume" in p.words]
        inside = {p.pid for p in found}
        return [p for p in found if p.parent not in inside]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _machines(self) -> list[Machine]:
        return [*self._nodes.values(), *([self._controller] if self._controller else [])]

    def _try(self, *command: str | os.PathLike[str], env: dict[str, str] | None = None, seconds: float = 20.0,
             ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        assert self._controller is not None, "the cluster is down"
        variables = {**machines.environment(), "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}
        inside = self._controller.enter(command)
        return subprocess.run(inside, env=variables, capture_output=True, text=True, timeout=seconds, check=False)

    def _on_controller(self, *command: str) -> str:
        assert self._controller is not None, "the cluster is down"
        return self._controller.run(*command)

    def _gone(self, interface: str) -> bool:
        return self._try("ip", "link", "show", interface).returncode != 0

    def _hosts(self, listed: str) -> tuple[str, ...]:
        if listed in ("", "(null)"):
            return ()
        return tuple(self.exec("scontrol", "show", "hostnames", listed).split())

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.out"

    def _write(self, *, slurmd_timeout: int, extra: str) -> None:
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = os.open(self.folder / "munge" / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(key, os.urandom(1024))
        os.close(key)
        addresses = {name: f"{SUBNET}.{10 + number}" for number, name in enumerate(self.names, start=1)}
        hosts = {"localhost": "127.0.0.1", "ctl": f"{SUBNET}.1", **addresses}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        (self.folder / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (self.folder / "slurm.conf").write_text(
            CONF.substitute(
                folder=self.folder, slurmd_timeout=slurmd_timeout, extra=extra, subnet=SUBNET,
                nodes="\n".join(f"NodeName={name} NodeAddr={address}" for name, address in addresses.items()),
                listed=",".join(self.names),
            )
        )  # fmt: skip
        (self.folder / "gres.conf").write_text("NodeName=g[1-8] Name=gpu Count=8\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\n")
