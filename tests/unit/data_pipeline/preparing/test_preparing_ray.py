"""On a local Ray: the same bytes, whatever dies."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from preparing_forms import Deadly, content

from data_pipeline.errors import BadArray
from data_pipeline.preparing.encode import Encoded, EncodeRule, ToEncode, encode
from data_pipeline.preparing.on_ray import IN_FLIGHT, OnRay
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find

ray = pytest.importorskip("ray")
RULE = PackRule(resolution=32)
PATHS = os.pathsep.join(filter(None, sys.path))


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, shared by the tests of this file."""
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": PATHS}},
    )  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(forms, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "set"
    pack(find(forms["files"], per_shard=2), folder, rule=RULE)
    return content(folder)


CHILD = """
import sys, os, ray
from pathlib import Path
from data_pipeline.preparing.on_ray import OnRay
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find
ray.init(address=sys.argv[3], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})
pack(find(Path(sys.argv[1]), per_shard=2), Path(sys.argv[2]), rule=PackRule(resolution=32), runner=OnRay(workers=1))
"""


@pytest.mark.parametrize("points", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_and_run_again(cluster, forms, whole, tmp_path, points):
    chance, out = random.Random(points), tmp_path / "out"
    for _ in range(points):
        arguments = [sys.executable, "-c", CHILD, str(forms["files"]), str(out), cluster]
        with subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": PATHS}) as child:
            while child.poll() is None and not list(out.glob("*.done.json")):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1))
            child.kill()
        gone(out)
        pack(find(forms["files"], per_shard=2), out, rule=RULE, runner=OnRay(workers=2))
        assert content(out) == whole
        shutil.rmtree(out)


def gone(out: Path) -> None:
    """Waits until an actor of a driver that was killed has ended, too: it works on for a moment, and may leave a file
    behind what a rerun sweeps."""
    for _ in range(200):
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.part-*")}
        time.sleep(0.25)
        busy = [p for p in psutil.process_iter(["cmdline"]) if "ray::_Worker" in " ".join(p.info["cmdline"] or ())]
        if not busy and {path: path.stat().st_mtime_ns for path in out.glob("*.part-*")} == before:
            return
    raise AssertionError("an actor outlived its driver")


class Slow:
    """Counts how many batches are with it; kills its process at the third, once."""

    def __init__(self, folder: Path, *, dies: bool) -> None:
        self._folder, self._dies = folder, dies

    def __call__(self, number: int):
        return self.run

    def run(self, batch: ToEncode) -> Encoded:
        calls = self._folder / f"{time.monotonic_ns()}.call"
        calls.touch()
        if self._dies and len(list(self._folder.glob("*.call"))) == 3:
            os._exit(9)
        return Encoded(latents=batch.images[:, ::8, ::8].transpose(0, 3, 1, 2).astype(np.float32))


def encoded(forms, out: Path, service: Slow, runner=None):
    rule = EncodeRule(resolution=16, batch=2)
    return encode(find(forms["tars"]), out, rule=rule, encoders=service, identity={"sha": "a"}, runner=runner)


def test_encoders_are_actors_and_one_that_dies_is_replaced(cluster, forms, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    encoded(forms, tmp_path / "one", Slow(tmp_path / "a", dies=False))
    made = encoded(forms, tmp_path / "two", Slow(tmp_path / "b", dies=True), OnRay(workers=1, encoders=1))
    assert made.view.num_samples == 14
    assert content(tmp_path / "one") == content(tmp_path / "two")
    # The batch that it died of was given to it again, and none was lost.
    assert len(list((tmp_path / "b").glob("*.call"))) > len(list((tmp_path / "a").glob("*.call")))


def test_a_worker_that_dies_is_replaced(cluster, forms, whole, tmp_path):
    deadly = Deadly(find(forms["files"], per_shard=2), tmp_path / "died", always=False)
    pack(deadly, tmp_path / "out", rule=RULE, runner=OnRay(workers=1))
    assert (tmp_path / "died").exists()
    assert content(tmp_path / "out") == whole


class Wrong(Slow):
    def run(self, batch: ToEncode) -> Encoded:
        return Encoded()


@pytest.mark.slow
def test_what_an_encoder_does_wrong_is_said_as_ever(cluster, forms, tmp_path):
    with pytest.raises(BadArray, match="neither latents nor text"):
        encoded(forms, tmp_path / "out", Wrong(tmp_path, dies=False), OnRay(workers=1))


def test_batches_in_flight_are_bounded():
    """A worker that decodes faster than it is encoded for waits."""
    from data_pipeline.preparing import on_ray

    assert IN_FLIGHT >= 1
    open_at_once: list[int] = []

    class Call:
        def __init__(self, counter: list[int]) -> None:
            self.counter = counter

        def remote(self, batch: int) -> int:
            self.counter[0] += 1
            open_at_once.append(self.counter[0])
            return batch

    class Encoder:
        def __init__(self, counter: list[int]) -> None:
            self.call = Call(counter)

    class FakeRay:
        def __init__(self, counter: list[int]) -> None:
            self.counter = counter

        def wait(self, references: list[int]) -> None:
            self.counter[0] -= len(references)

    counter = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "_ray", lambda: FakeRay(counter))
        service = on_ray._Remote([Encoder(counter), Encoder(counter)], first=1)
        for batch in range(10):
            service(batch)
    assert max(open_at_once) == IN_FLIGHT
