"""Machines made of namespaces: each has a name, processes, an /etc/hosts and a network of its own, and one pid to pull the plug.

A machine is `unshare` with bash as its first process, which reaps orphans; the kernel kills all its processes with the first
one. `unshare` dies with the process that started it (a test run that is killed leaves no daemon), so start machines in the main
thread: the kernel means the thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"]))
"""Daemons lie where not every user's PATH leads."""
NAMESPACES = ("--net", "--uts", "--mount")
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "bash")


def environment() -> dict[str, str]:
    """Ours, without what a surrounding Slurm job may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return {**kept, "PATH": PATH}


def missing(programs: Iterable[str]) -> list[str]:
    return [name for name in programs if shutil.which(name, path=PATH) is None]


def not_possible() -> str | None:
    """Why there can be no such machines here; None where they can be made."""
    if os.geteuid() != 0:
        return "namespaces and bridges need root"
    if lacking := missing(PROGRAMS):
        return f"{', '.join(lacking)} not found (Debian: iproute2, util-linux)"
    attempt = [*("unshare", *NAMESPACES, "--pid", "--fork"), *("ip", "link", "add", "br0", "type", "bridge")]
    made = subprocess.run(attempt, env=environment(), capture_output=True, text=True, check=False)
    return f"the kernel refuses namespaces: {made.stderr.strip()}" if made.returncode else None


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a machine, as the test's own machine numbers it."""

    pid: int
    parent: int
    words: tuple[str, ...]
    env: Mapping[str, str]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


class Machine:
    """A machine that is on."""

    def __init__(self, name: str, *, script: str, words: Sequence[str], log: Path, own_proc: bool) -> None:
        """
        Args:
            script: what its first process, a bash, does once its /etc is its own; `words` are its arguments.
            log: where its output goes, added to.
            own_proc: whether it sees its own /proc. Without, commands from outside can be run in it (`enter`).
        """
        self.name = name
        kinds = [*NAMESPACES, "--pid", "--fork", "--kill-child=SIGKILL", *(["--mount-proc"] if own_proc else [])]
        start = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "bash", "-euc", script, name, *words]
        with log.open("ab") as out:
            self._parent = subprocess.Popen(
                start, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children")
        until(lambda: self._parent.poll() is None and children.read_text().split(), what=f"{name} to start", seconds=10)
        self.first = int(children.read_text().split()[0])
        """The machine's process 1."""
        until(lambda: _net(self.first) != _net("self"), what=f"{name} to have a network of its own", seconds=10)

    def enter(self, command: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs `command` in this machine, in the folder where it is called."""
        # Not `--wd`: that folder would be one of the mounts outside, and a rename between `a` and `/where/a` would cross devices.
        inside = ["nsenter", f"--target={self.first}", *NAMESPACES, f"--wdns={Path.cwd()}", "--"]
        return [*inside, *map(os.fspath, command)]

    def run(self, *command: str) -> str:
        """A command that must succeed; its output."""
        done = subprocess.run(self.enter(command), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)} on {self.name}: {done.stderr.strip()}"
        return done.stdout

    def processes(self) -> list[Process]:
        """All of them, the first one before its children."""
        return list(_tree(self.first))

    def power_off(self, *, wait: bool = True) -> None:
        """At once, with everything that runs there, as when the cable is pulled out. The kernel takes a second or two to take the
        namespaces apart, which `wait` waits for; call it again to wait later."""
        self._parent.kill()
        if wait:
            self._parent.wait()
            until(lambda: not Path(f"/proc/{self.first}").exists(), what=f"the end of {self.name}", seconds=30)


def until(true: Callable[[], object], *, what: str, seconds: float, every: float = 0.02) -> None:
    """Waits for something to be true; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(every)


def _net(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _tree(pid: int, *, parent: int = 0) -> Iterator[Process]:
    """A process and its descendants; those that end meanwhile are left out."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError):
        return
    yield Process(pid=pid, parent=parent, words=tuple(words), env=dict(p.split("=", 1) for p in pairs if "=" in p))
    for child in children:
        yield from _tree(child, parent=pid)
