"""SIGKILL at any moment, then the same command again: the same bytes, and nothing left over."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preparing_forms import Deadly, content

from data_pipeline.parts import Part
from data_pipeline.preparing.drive import PLAN
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find

RULE = PackRule(resolution=32)
# Each life is a fork of a process that has imported everything, so that lives are short and deaths fall into their work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["webdataset", "data_pipeline.preparing.pack", "simplejpeg", "cv2"])


def command(source: Path, out: Path, part: str | None) -> None:
    pack(find(source, per_shard=2), out, rule=RULE, part=None if part is None else Part.parse(part))


def life(source: Path, out: Path, *, part: str | None = None) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=command, args=(source, out, part))
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess) -> bool:
    """Whether it was still at work."""
    alive = process.is_alive()
    assert process.pid is not None
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


@pytest.fixture(scope="module")
def whole(forms, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "set"
    command(forms["files"], folder, None)
    return content(folder)


def seconds(source: Path, out: Path) -> float:
    first = life(source, out)
    first.join()
    shutil.rmtree(out)
    start = time.monotonic()
    life(source, out).join()
    shutil.rmtree(out)
    return time.monotonic() - start


def test_killed_at_random_and_run_again(forms, whole, tmp_path):
    chance, out = random.Random(1), tmp_path / "out"
    span, killed, half = seconds(forms["files"], out), 0, 0
    trials = 0
    while killed < 20:
        trials += 1
        assert trials < 200
        process = life(forms["files"], out)
        written = chance.randrange(len(whole))  # a moment of the work, however fast this machine is just now
        while process.is_alive() and (not out.exists() or len(list(out.iterdir())) < written):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, span / len(whole)))
        killed += kill(process)
        if out.exists():
            there = content(out)
            half += PLAN in there and there != whole
            assert all(there[name] == whole[name] for name in there if name in ("manifest.json", PLAN))
        command(forms["files"], out, None)
        assert content(out) == whole
        shutil.rmtree(out)
    assert half >= 5, "deaths fell into the work"


@pytest.mark.parametrize("points", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_parts_killed_at_random(forms, whole, tmp_path, points):
    """Two parts at once, one of them killed; the other goes on, and both again."""
    chance, out = random.Random(points), tmp_path / "out"
    span = seconds(forms["files"], out)
    for _ in range(points):
        parts = [life(forms["files"], out, part=f"{number}/2") for number in (1, 2)]
        time.sleep(chance.uniform(0, span))
        kill(parts[chance.randrange(2)])
        for part in parts:
            part.join()
        command(forms["files"], out, "1/2")
        left = [name for name in content(out) if name.endswith(".claim")]
        if left:  # of the dead one: its lease runs, so its shard waits for it or for its own part
            for name in left:
                os.utime(out / name, (0, 0))
            command(forms["files"], out, "2/2")
        assert content(out) == whole
        shutil.rmtree(out)


CHILD = """
from pathlib import Path
import sys
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find
if __name__ == "__main__":
    pack(find(Path(sys.argv[1]), per_shard=2), Path(sys.argv[2]), rule=PackRule(resolution=32), runner=Local(workers=2))
"""


@pytest.mark.parametrize("points", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_die_with_their_command(forms, whole, tmp_path, points):
    """The command alone is killed; its workers follow, and a second run is not disturbed."""
    import psutil

    chance, out = random.Random(points), tmp_path / "out"
    (tmp_path / "child.py").write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(points):
        arguments = [sys.executable, str(tmp_path / "child.py"), str(forms["files"]), str(out)]
        with subprocess.Popen(arguments, env=environment) as child:
            while child.poll() is None and not list(out.glob("*.done.json")):
                time.sleep(0.01)
            workers = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
            time.sleep(chance.uniform(0, 0.1))
            child.kill()
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        assert gone or child.returncode == 0
        pack(find(forms["files"], per_shard=2), out, rule=RULE, runner=Local())
        assert content(out) == whole
        shutil.rmtree(out)


def test_a_worker_that_dies_is_replaced(forms, whole, tmp_path):
    deadly = Deadly(find(forms["files"], per_shard=2), tmp_path / "died", always=False)
    pack(deadly, tmp_path / "out", rule=RULE, runner=Local(workers=2))
    assert (tmp_path / "died").exists()
    assert content(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_named(forms, tmp_path):
    from data_pipeline.errors import DataError

    deadly = Deadly(find(forms["files"], per_shard=2), tmp_path / "died", always=True)
    with pytest.raises(DataError, match=r"shard-000002.tar.*3 processes died at it"):
        pack(deadly, tmp_path / "out", rule=RULE, runner=Local(workers=2))
