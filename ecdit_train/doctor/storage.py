"""The file system of a run folder: room, and the promises that a run builds on (docs/runbook/storage.md)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ecdit_train import atomic
from ecdit_train.doctor.findings import Check, Finding, fail, ok, warning
from ecdit_train.run_folder import CHECKPOINTS, by_step
from launch import preflight_task
from launch.description import CHECKPOINTS_FREE, CLOCK_SECONDS

PLAN_SECONDS = 120.0
"""For the plan, which imports torch in a process of its own."""

COMFORTABLE = 2.2
"""Checkpoints that should fit: two that are kept, one more that is being written beside the logs, samples and traces."""
UNKNOWN_BYTES = 10e9
"""That a run folder should have where no checkpoint's size is known."""
SLOW_FSYNC = 2.0
HANGS = "the file system does not answer: ask its operators, or choose another run folder; a run there would hang (exit code 86)"
SEE = """import sys
from pathlib import Path
from launch.preflight_task import meets
sys.exit(not meets(Path(sys.argv[1]), token=sys.argv[2], host="other"))
"""
MOUNTINFO = Path("/proc/self/mountinfo")

NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "afs")
PARALLEL = ("lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "pvfs2", "orangefs", "quobyte")


def checks(run: Path, *, size: Callable[[], float], nodes: int) -> list[Check]:
    """`size`: bytes of a checkpoint, 0 where it is not known; takes its time. `run` need not be there yet."""
    return [
        Check(what="disk", ask=lambda: room(run, checkpoint_bytes=size()), seconds=PLAN_SECONDS, hangs=HANGS),
        Check(what="mount", ask=lambda: mount(nearest(run), nodes=nodes), hangs=HANGS),
        Check(what="files", ask=lambda: promises(nearest(run)), seconds=60.0, hangs=HANGS),
    ]


def nearest(run: Path) -> Path:
    """The folder, or the one that it will be made in."""
    run = run.absolute()
    return next((path for path in (run, *run.parents) if path.exists()), Path("/"))


def room(run: Path, *, checkpoint_bytes: float) -> Iterator[Finding]:
    """Free bytes against the size of a checkpoint; of a run that has some, of the newest one."""
    folder = nearest(run)
    free, size = preflight_task.free(folder), checkpoint_bytes or newest_bytes(run)
    fix = f"make room (df -h {folder}; quotas too; older steps of a run can go, whole folders), or choose another run folder"
    if free is None:
        yield fail("disk", f"{folder} cannot be asked for its free space", HANGS)
    elif not size:
        found = f"{free / 1e9:.1f} GB free in {folder}; a checkpoint's size is not known (name a run, or words of one)"
        yield ok("disk", found) if free >= UNKNOWN_BYTES else warning("disk", found, fix)
    else:
        found = f"{free / 1e9:.1f} GB free in {folder}, {free / size:.1f} checkpoints of {size / 1e9:.2f} GB"
        if free < CHECKPOINTS_FREE * size:
            yield fail("disk", f"{found}; a job's checks ask for {CHECKPOINTS_FREE:g}", fix)
        else:
            yield ok("disk", found) if free >= COMFORTABLE * size else warning("disk", found, fix)


def newest_bytes(run: Path) -> float:
    """Of the newest committed step; 0: none."""
    steps = [path for _, path in by_step(run / CHECKPOINTS, suffix="") if path.is_dir()]
    return float(sum(path.stat().st_size for path in steps[-1].rglob("*") if path.is_file())) if steps else 0.0


# --- what it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    at: str
    kind: str
    options: frozenset[str]


def mount_of(folder: Path, *, table: Path = MOUNTINFO) -> Mount | None:
    """The file system that a folder lies on; None where the system does not say."""
    place, best = os.path.realpath(folder), None
    for line in table.read_text().splitlines() if table.exists() else ():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 6 or len(rest) < 3:
            continue
        at = fields[4].encode().decode("unicode_escape")  # \040 is a space
        if (f"{place}/".startswith(f"{at.rstrip('/')}/")) and (best is None or len(at) >= len(best.at)):
            best = Mount(at=at, kind=rest[0], options=frozenset([*fields[5].split(","), *rest[2].split(",")]))
    return best


def mount(folder: Path, *, nodes: int, table: Path = MOUNTINFO) -> Iterator[Finding]:
    """What kind of file system it is, and what that kind is known to do to a run."""
    found = mount_of(folder, table=table)
    if found is None:
        yield warning("mount", f"unknown kind of file system at {folder}", "look at it by hand: mount, df -T")
        return
    what, own = f"{found.at} is {found.kind}", found.kind.removeprefix("fuse.")
    if "ro" in found.options:
        yield fail("mount", f"{what}, read-only", "remount it, or choose another run folder (docs/runbook/storage.md)")
    elif found.kind in NETWORK and "soft" in found.options:
        fix = "mount it hard: a soft mount gives up in the middle of a write, and a checkpoint fails for a busy server"
        yield warning("mount", f"{what}, mounted soft", fix)
    elif found.kind in NETWORK:
        fix = "fine for a few nodes; for many names are seen late and saves wait for one server: prefer a parallel file system"
        yield warning("mount", what, fix)
    elif found.kind.startswith("fuse") and own not in PARALLEL:
        fix = "FUSE may cache, and rename without being atomic: keep run folders elsewhere unless its manual says otherwise"
        yield warning("mount", what, fix)
    elif found.kind in ("tmpfs", "ramfs"):
        yield warning(
            "mount", f"{what}: memory", "it is gone with the machine: keep run folders on a disk that outlives it"
        )
    elif own not in PARALLEL and nodes > 1:
        fix = "all nodes of a job must see the run folder: use one on a shared file system"
        yield warning("mount", f"{what}, which other nodes do not see, and the run has {nodes}", fix)
    else:
        yield ok("mount", what)


# --- what it does ---------------------------------------------------------------------------------------------------


def promises(folder: Path) -> Iterator[Finding]:
    """Writes into a folder of its own in there, and takes it away again."""
    try:
        place = Path(tempfile.mkdtemp(dir=folder, prefix=".ecdit-doctor-"))
    except OSError as error:
        yield fail(
            "write", f"{folder} cannot be written: {error}", "docs/runbook/storage.md: df, df -i, quota, who owns it"
        )
        return
    try:
        for what, ask in (("rename", rename), ("fsync", fsync), ("visible", visible), ("clock", clock)):
            try:
                yield from ask(place)
            except OSError as error:
                yield fail(what, f"{folder}: {error}", "docs/runbook/storage.md")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def rename(place: Path) -> Iterator[Finding]:
    """A file is replaced, a folder is put in its place, and a name that is taken by a folder with content is not lost: what commits
    and the lease are made of."""
    target, fix = place / "file", "no checkpoint can be committed there: choose a POSIX file system"
    for text in (b"old", b"new"):
        atomic.write(target, text)
    if target.read_bytes() != b"new" or len(list(place.iterdir())) != 1:
        yield fail("rename", "a file that was replaced holds the old content, or left others beside it", fix)
        return
    for name in ("one", "two"):
        (place / name).mkdir()
        (place / name / "content").write_text(name)
    with contextlib.suppress(OSError):
        os.rename(place / "one", place / "two")
        yield fail("rename", "a folder was put over another one with content", fix)
        return
    os.rename(place / "one", place / "three")
    whole = (place / "three" / "content").read_text() == "one" and not (place / "one").exists()
    yield (
        ok("rename", "atomic for files and folders") if whole else fail("rename", "a renamed folder is not whole", fix)
    )


def fsync(place: Path) -> Iterator[Finding]:
    """A small file and its folder, written through; and a name that only one of two may take."""
    began = time.monotonic()
    atomic.write(place / "through", b"x" * 4096)
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    seconds = time.monotonic() - began
    os.close(os.open(place / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(place / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        yield fail(
            "fsync",
            "two could take the same name (O_EXCL is ignored)",
            "choose a POSIX file system: a run could have two owners",
        )
        return
    except FileExistsError:
        pass
    found = f"{1000 * seconds:.0f} ms for 4 KB written through; a name is taken once"
    fix = "every line of metrics is written through: logs less often (observe.log_every), or choose a faster disk"
    yield ok("fsync", found) if seconds < SLOW_FSYNC else warning("fsync", found, fix)


def visible(place: Path) -> Iterator[Finding]:
    """As the checks of a job ask every node: what one process has renamed another one sees, and the other way round."""
    token, began = secrets.token_hex(8), time.monotonic()
    atomic.write(place / "supervisor", token.encode())
    seen = (
        subprocess.run([sys.executable, "-c", SEE, str(place), token], capture_output=True, check=False).returncode == 0
    )
    back = (place / "other").exists() and (place / "other").read_text() == token
    if seen and back:
        yield ok(
            "visible",
            f"to two processes of this machine, {time.monotonic() - began:.1f} s; nodes ask each other before each life",
        )
    else:
        fix = "the file system shows files late (attribute caches: mount with actimeo=1 or less), or not at all"
        yield fail("visible", "a renamed file is not seen by another process of this machine", fix)


def clock(place: Path) -> Iterator[Finding]:
    """The time of a new file, which its server sets, against ours."""
    before = time.time()
    (place / "now").write_text("x")
    made, after = (place / "now").stat().st_mtime, time.time()
    skew = made - after if made > after else min(0.0, made - before)
    found = f"the run folder's server differs by {skew:+.1f} s"
    fix = (
        f"start chrony or ntpd where the clock is wrong; nodes that differ by more than {CLOCK_SECONDS:g} s are refused"
    )
    yield ok("clock", found) if abs(skew) <= CLOCK_SECONDS else warning("clock", found, fix)
