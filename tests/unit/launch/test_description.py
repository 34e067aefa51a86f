"""job.json: what the supervisor is told, and what a container must see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

import ecdit_train
from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.errors import ConfigError
from launch import job_file
from launch.description import describe
from launch.mounts import mounts, outside

PYXIS = {"cluster.container": "registry.example.org#ecdit:1", "data.shards": "/lustre/set"}


@cache
def config(cluster: str = "h100_ib400"):
    return compose(["experiment=ec_dit_xl_8e", f"cluster={cluster}", "encoders=shards"], local=False)


def told(values: dict[str, object], *, cluster: str = "h100_ib400", **more: object):
    return describe(with_values(config(cluster), values), **{"run": "/runs/x", "code": None, "cwd": "/home/me", **more})


def test_all_of_it():
    values = {"data.shards": "images", "cluster.interface": "ib0", "cluster.lives": 7, "cluster.bad_node": "drain",
              "cluster.preflight_bandwidth": 1e10, "cluster.nodes": 4}  # fmt: skip
    made = told(values, code="/runs/x/code/1", words=["--config-dir", "/d"], checkpoint_bytes=1e9)
    assert made.ranks is None
    assert json.loads(made.text) == made.description == {
        "format": 1,
        "run": "/runs/x",
        "code": "/runs/x/code/1",
        "python": sys.executable,
        "srun": ["--cpus-per-task=96"],
        "nodes": 4,
        "ranks_per_node": 8,
        "gpu": True,
        "words": ["--config-dir", "/d"],
        "lead": 600,
        "lives": {"without_progress": 3, "total": 7, "back_off": [15.0, 60.0, 240.0]},
        "bad_node": "drain",
        "interface": "ib0",
        "preflight": {
            "gpus": 8,
            "free_bytes": 2000000000,
            "clock_seconds": 5.0,
            "bandwidth": 1e10,
            "folders": ["/runs/x", "/home/me/images"],
        },
    }  # fmt: skip


CLUSTERS = sorted(path.stem for path in (Path(ecdit_train.__file__).parent / "conf" / "cluster").glob("[a-z]*.yaml"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"cluster.interface": "ib0", "cluster.bad_node": "keep", "cluster.back_off": (0.5, 9.0), "cluster.nodes": 3},
        {"cluster.container": "image.sif", "cluster.container_kind": "apptainer", "cluster.preflight_bandwidth": 2e9},
        {"cluster.container": "image", "cluster.lives": 5, "cluster.lives_without_progress": 1},
    ],
    ids=["plain", "every key of a life", "apptainer", "pyxis"],
)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_supervisor_reads_what_is_written(cluster, values, tmp_path):
    """Every field, from every cluster file: what one side writes and the other does not know would end a job on its first line."""
    made = told(values, cluster=cluster, code="/runs/x/code/1", words=["--config-dir", "/d"], checkpoint_bytes=3e9)
    (tmp_path / "job.json").write_text(made.text)
    read = asdict(job_file.read(tmp_path / "job.json"))
    assert {"format": job_file.FORMAT, **json.loads(json.dumps(read))} == made.description


def test_without_gpus():
    made = told({}, cluster="local").description
    assert (made["gpu"], made["preflight"]["gpus"], made["preflight"]["free_bytes"]) == (False, 0, 0)


@pytest.mark.parametrize(("values", "python"), [
    ({}, sys.executable),
    ({"cluster.python": "/opt/venv/bin/python"}, "/opt/venv/bin/python"),
    (PYXIS, "python"),
    ({**PYXIS, "cluster.python": "python3.12"}, "python3.12"),
])  # fmt: skip
def test_the_ranks_interpreter(values, python):
    assert told(values).description["python"] == python


def test_pyxis():
    srun = told(
        {**PYXIS, "train.init_from": "runs/old", "cluster.mounts": ("/scratch:/tmp", "/opt/tools")}
    ).description["srun"]
    assert srun == [
        "--cpus-per-task=96",
        "--container-image=registry.example.org#ecdit:1",
        "--container-mounts=/scratch:/tmp,/opt/tools:/opt/tools,/home/me:/home/me,/runs/x:/runs/x,/lustre/set:/lustre/set",
        "--container-workdir=/home/me",
    ]


def test_apptainer_is_the_ranks_interpreter(tmp_path):
    """Run with a stand-in: what it is given, and that a word with spaces survives."""
    run = tmp_path / "run"
    made = told({**PYXIS, "cluster.container": "image of us.sif".replace(" ", "_"), "cluster.container_kind": "apptainer"},
                run=str(run), cwd=str(tmp_path))  # fmt: skip
    assert made.description["python"] == f"{run}/ranks.sh"
    assert made.description["srun"] == ["--cpus-per-task=96"]
    run.mkdir()
    (run / "ranks.sh").write_text(made.ranks)
    (tmp_path / "apptainer").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    for path in (run / "ranks.sh", tmp_path / "apptainer"):
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.run([run / "ranks.sh", "-m", "a b"], env=env, capture_output=True, text=True, check=True).stdout
    seen = f"{tmp_path}:{tmp_path},/lustre/set:/lustre/set"
    assert words.splitlines() == [
        *("exec", "--nv", "--bind", seen, "--pwd", str(tmp_path), "image_of_us.sif", "python", "-m", "a b"),
    ]
    cpu = told({"cluster.container": "i.sif", "cluster.container_kind": "apptainer"}, cluster="local")
    assert "--nv" not in cpu.ranks


# --- what a container sees --------------------------------------------------------------------------------------------


def seen(values: dict[str, object], *, run: str = "/runs/x", cwd: str = "/home/me") -> list[str]:
    return [inside if out == inside else f"{out}:{inside}" for out, inside in
            mounts(with_values(config(), values), run=run, cwd=cwd)]  # fmt: skip


def test_every_path_of_the_run():
    kl, t5 = "/models/kl", "../models/t5"
    encoders = compose(
        ["experiment=ec_dit_xl_8e", "encoders=paper", f"encoders.image.path={kl}", f"encoders.text.path={t5}"],
        local=False,
    )
    found = mounts(with_values(encoders, {"data.shards": "/lustre/set", "train.init_from": "/runs/old"}),
                   run="/runs/x", cwd="/home/me")  # fmt: skip
    assert [inside for _, inside in found] == ["/home/me", "/runs/x", "/lustre/set", "/runs/old", "/home/models/t5", kl]


def test_none_lies_inside_another():
    assert seen({"data.shards": "images"}, run="/home/me/runs/x") == ["/home/me"]
    assert seen({"data.shards": "s3://bucket/set"}) == ["/home/me", "/runs/x"]
    assert seen({"data.shards": "/runs/images"}, run="/runs/images/x", cwd="/runs/images/x") == ["/runs/images"]
    assert seen({"data.shards": "/datasets/a", "cluster.mounts": ("/lustre:/datasets",)}) == [
        "/lustre:/datasets", "/home/me", "/runs/x",
    ]  # fmt: skip


def test_where_links_lead(tmp_path):
    """A container that sees the link and not what it leads to sees nothing."""
    (tmp_path / "big").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "images").symlink_to(tmp_path / "big")
    assert seen({"data.shards": "images"}, cwd=str(tmp_path / "home")) == [
        str(tmp_path / "home"), "/runs/x", str(tmp_path / "big"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["/a,b", "/a:b", '/a"b'])
def test_a_path_that_no_flag_can_carry(path):
    with pytest.raises(ConfigError, match="lies where no container can be told to look"):
        seen({"data.shards": path})


def test_where_it_lies_outside():
    assert outside("/data/a", mounts=("/lustre/set:/data",)) == Path("/lustre/set/a")
    assert outside("/data", mounts=("/lustre/set:/data",)) == Path("/lustre/set")
    assert outside("/database", mounts=("/lustre/set:/data",)) == Path("/database")
    assert outside("a/../b", mounts=(), cwd="/home") == Path("/home/b")
