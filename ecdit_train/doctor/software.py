"""Python, the packages that we are tested with, and what torch can do on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import ecdit_train
from ecdit_train.doctor.findings import Check, Finding, fail, ok, warning
from launch import preflight_task
from launch.bandwidth import MARK

TORCH_SECONDS = 120.0
"""For one import of torch, on a cold shared file system."""
MEET_SECONDS = 180.0
PROBE = """
import json, torch
try:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
except Exception as error:
    nccl = str(error)
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, gpus=names, nccl=nccl)))
"""


def checks(*, wants_gpus: int | None) -> list[Check]:
    """`wants_gpus`: of this machine, for the run that is asked about; None: nobody said."""
    slow = "a shared file system that is cold or too slow for an environment? put the environment on a local disk, or try again"
    return [
        Check(what="python", ask=python),
        Check(what="packages", ask=packages),
        Check(what="torch", ask=lambda: torch(wants_gpus), seconds=TORCH_SECONDS, hangs=slow),
        Check(
            what="all-reduce", ask=all_reduce, seconds=MEET_SECONDS, hangs="a firewall on loopback, or GPUs that hang?"
        ),
    ]


def requirements() -> tuple[str, list[str]]:
    """(Python's range, requirements without extras) of the checkout that runs, or of the installed package;
    nothing where neither says."""
    project = Path(ecdit_train.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        said = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return said["requires-python"], list(said["dependencies"])
    try:
        installed = metadata.distribution("ecdit")
    except metadata.PackageNotFoundError:
        return "", []
    return installed.metadata["Requires-Python"] or "", [r for r in installed.requires or [] if "extra ==" not in r]


def python() -> Iterator[Finding]:
    wanted, version = requirements()[0], ".".join(map(str, sys.version_info[:3]))
    if _outside(version, wanted):
        yield fail(
            "python",
            f"{version}, and {wanted} is needed",
            "make an environment with another Python: make setup PYTHON=...",
        )
    else:
        yield ok("python", f"{version} ({sys.executable})")


def packages(named: Sequence[str] | None = None) -> Iterator[Finding]:
    """Every requirement against what is installed. `named`: instead of ours."""
    asked = requirements()[1] if named is None else named
    if not asked:
        yield warning(
            "packages", "ecdit is not installed here, so nothing says which versions it needs", "pip install ecdit"
        )
    other, missing = [], []
    for line in asked:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*([^;]*)", line)
        assert match is not None
        name, wanted = match[1], match[2].strip()
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name}{wanted}")
            continue
        if _outside(there, wanted):
            other.append(f"{name} {there} ({wanted})")
    fix = "install what is pinned: make setup, or pip install -e . -c constraints.txt"
    if missing:
        yield fail("packages", f"not installed: {', '.join(missing)}", fix)
    if other:
        yield warning("packages", f"other versions than those tested: {', '.join(other)}", fix)
    if asked and not missing and not other:
        yield ok("packages", f"all {len(asked)} as pinned")


def _outside(version: str, wanted: str) -> bool:
    """Whether a version lies outside of `>=1.2,<3` or `==1.2.3`; a local part (`2.13.0+cpu`) does not count."""
    here = _parts(version)
    for clause in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(==|>=|<=|<|>|!=)\s*(\S+)", clause)
        if match is None:
            continue
        there = _parts(match[2])
        length = max(len(here), len(there))
        a, b = (parts + (0,) * (length - len(parts)) for parts in (here, there))
        holds = {"==": a == b, ">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b, "!=": a != b}
        if not holds[match[1]]:
            return True
    return False


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def torch(wants_gpus: int | None) -> Iterator[Finding]:
    """In a process of its own: what it is built for, and the GPUs that it and the driver see."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=TORCH_SECONDS
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield fail("torch", f"cannot be imported: {last}", "install it for this machine: make setup, or docker/")
        return
    said = json.loads(done.stdout.splitlines()[-1])
    build = f"for CUDA {said['cuda']}" if said["cuda"] else "for CPUs"
    yield ok("torch", f"{said['version']} {build}" + (f", NCCL {said['nccl']}" if said["nccl"] else ""))
    yield from gpus(said["gpus"], cuda=said["cuda"], wanted=wants_gpus)


def gpus(names: Sequence[str], *, cuda: str | None, wanted: int | None) -> Iterator[Finding]:
    """`names`: of those that torch sees; what the driver sees is asked here."""
    told = preflight_task.gpus()
    there, trouble = int(told["gpus"]), told.get("gpu_trouble")
    if trouble:
        yield fail("gpus", str(trouble), "have the node drained and its GPUs reset or replaced")
    if there and not names:
        fix = (
            "install torch's CUDA build"
            if cuda is None
            else "the driver is older than torch's CUDA: nvidia-smi shows its version"
        )
        yield fail("gpus", f"{there} in this machine, and torch sees none", fix)
    elif names:
        few = wanted is not None and len(names) < wanted
        found = f"{len(names)} x {', '.join(sorted(set(names)))}, driver {_driver()}"
        fix = "this is not a node of that partition? cluster.gpus_per_node says how many it should have"
        yield fail("gpus", f"{found}; {wanted} are needed", fix) if few else ok("gpus", found)
    elif not trouble:
        yield ok(
            "gpus", "none in this machine" + ("; a compute node has them (run doctor there, too)" if wanted else "")
        )


def _driver() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return said[0] if said else "unknown"


def all_reduce() -> Iterator[Finding]:
    """Every GPU of this machine over NCCL, or two ranks over gloo, through the launcher and the rendezvous of a real run."""
    gpus = int(preflight_task.gpus()["gpus"])
    ranks = gpus or 2
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "ECDIT_")) and k not in ("RANK", "WORLD_SIZE")
    }
    env = kept | {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    what = f"{ranks} rank{'s' * (ranks != 1)} over {'NCCL' if gpus else 'gloo and loopback'}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launch.bandwidth", str(ranks), "1"],
            env=env, capture_output=True, text=True, timeout=MEET_SECONDS - 10, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield fail(
            "all-reduce", f"{what}: they did not meet", "docs/runbook/rendezvous.md; on GPUs set NCCL_DEBUG=INFO"
        )
        return
    line = next((line for line in done.stdout.splitlines() if MARK in line), None)
    if done.returncode == 0 and line is not None:
        yield ok("all-reduce", f"{what}: {float(line.partition(MARK)[2]) / 1e9:.2f} GB/s")
    else:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        fix = "docs/runbook/rendezvous.md; on GPUs set NCCL_DEBUG=INFO"
        yield fail("all-reduce", f"{what}: exit code {done.returncode}: {last}", fix)
