"""A working directory may hold modules of our names, or of our vendors' names: no command and no job imports them.

Each hostile file leaves its name in `executed` and raises. What is started is the installed command, what a job starts, and
`-m ecdit_train.cli` typed by hand (where only an `ecdit_train.py` of one's own cannot be passed over).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_runs import words

ROOT = Path(__file__).parents[2]
BY_HAND = (sys.executable, "-m", "ecdit_train.cli")
HOSTILE = ("launch.py", "data_pipeline.py", "ecdit_train.py", "torch.py", "wandb/__init__.py", "conf/__init__.py")
HOSTILE_CODE = """
from pathlib import Path
with open(Path(__file__).parent / ("../executed" if __file__.endswith("__init__.py") else "executed"), "a") as file:
    file.write(__file__ + chr(10))
raise ImportError("the working directory's own file was executed")
"""


def plant(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(HOSTILE_CODE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name in HOSTILE:
        plant(folder, name)
    (folder / "conf" / "config.yaml").write_text("defaults: []\n")
    return folder


@pytest.fixture
def by_hand(hostile: Path, tmp_path: Path) -> Path:
    """The same without `ecdit_train.py`, which Python itself would run in place of ours."""
    shutil.copytree(hostile, tmp_path / "hostile")
    (tmp_path / "hostile" / "ecdit_train.py").unlink()
    return tmp_path / "hostile"


def run(command: list[str], cwd: Path, *, code: int = 0, env: Mapping[str, str] | None = None) -> str:
    """Standard output. `ecdit` is the installed command; packages come from here by PYTHONPATH, set on purpose."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    program = [str(Path(sys.executable).with_name("ecdit"))] if command[0] == "ecdit" else [command[0]]
    done = subprocess.run(
        [*program, *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert not (cwd / "executed").exists(), (cwd / "executed").read_text()
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


def test_the_files_are_hostile(hostile: Path) -> None:
    """Without this the tests below could not fail: a plain `-m` runs them."""
    for name in ("launch", "data_pipeline", "ecdit_train", "torch", "wandb", "conf"):
        done = subprocess.run([sys.executable, "-m", name], cwd=hostile, capture_output=True, text=True)
        assert "was executed" in done.stderr, name
    executed = hostile / "executed"
    assert len(executed.read_text().splitlines()) == len(HOSTILE)
    executed.unlink()


@pytest.mark.parametrize("program", [["ecdit"], list(BY_HAND)], ids=["command", "by hand"])
@pytest.mark.parametrize(
    ("verb", "says"),
    [
        ("config show experiment=ec_dit_xl_8e", "ec_dit_xl_8e"),
        ("config keys", "train.steps"),
        ("plan experiment=ec_dit_m_64e cluster=h100_ib400 cluster.nodes=8", "97"),
        ("launch experiment=ec_dit_xl_8e cluster=h100_ib400 data.shards=/data --render-only", "PYTHONSAFEPATH=1"),
        ("data shapes out=shards count=8 resolution=16 per_shard=4", "8"),
    ],
    ids=lambda text: text.split()[0],
)
def test_verbs_that_need_one_process(
    verb: str, says: str, program: list[str], hostile: Path, by_hand: Path, tmp_path: Path
) -> None:
    folder = by_hand
    if program == ["ecdit"]:
        shutil.copytree(hostile, folder := tmp_path / "all")
    assert says in run([*program, *verb.split()], folder)


def test_training_and_its_job(hostile: Path, tmp_path: Path, tiny_shards: Path) -> None:
    """A step on two ranks of this machine; the job that `ecdit launch` submits takes the next one with the code that it copied."""
    cluster = ("cluster=local", "cluster.gpus_per_node=2")
    line = words("run", tiny_shards, "train.steps=2", "optim.warmup_steps=1", "parallel=pair", *cluster)
    run(["ecdit", "--nproc", "2", "train", *line, "--stop-after", "1"], hostile, code=75)
    slurm = tmp_path / "bin"
    slurm.mkdir()
    (slurm / "sbatch").write_text("#!/bin/sh\necho 4711\n")
    (slurm / "sbatch").chmod(0o755)
    run(["ecdit", "launch", *line], hostile, env={"PATH": f"{slurm}:/usr/bin:/bin"})
    job = json.loads((hostile / "run" / "job.json").read_text())
    own = tmp_path / "own"  # safe start passes over the working directory, not over what somebody put on the path
    own.mkdir()
    (own / "sitecustomize.py").write_text("import os; open(f'{__file__}.{os.environ.get(\"RANK\")}', 'w')")
    ranks = [job["python"], "-m", "ecdit_train.cli", "--nproc", "2", "resume", job["run"], *job["words"]]
    run(ranks, hostile, env={"PYTHONPATH": f"{job['code']}:{own}", "PYTHONSAFEPATH": "1"})
    assert {path.suffix for path in own.glob("sitecustomize.py.*")} == {".None", ".0", ".1"}
    run(["ecdit", "report", "run"], hostile)
    assert len((hostile / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    git = json.loads(next(Path(job["code"]).glob("snapshot.json")).read_text())["git"]
    made = json.loads((hostile / "run" / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert git is None or git["commit"] in json.dumps(made)  # a copy knows the commit that it is of


def test_torchrun_by_hand(by_hand: Path, tiny_shards: Path) -> None:
    line = words("run", tiny_shards, "train.steps=2", "optim.warmup_steps=1", "parallel=pair")
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    run([torchrun, "--standalone", "--nproc-per-node=2", "-m", "ecdit_train.cli", "train", *line], by_hand)
    assert len((by_hand / "run" / "metrics.jsonl").read_text().splitlines()) == 2
