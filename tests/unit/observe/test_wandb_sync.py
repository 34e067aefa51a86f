"""`ecdit dash sync` brings to W&B what it lacks, once, at any time: real W&B before a server on loopback."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from observe_wandb_file import run_files
from observe_wandb_runs import about, allocated, asked, opened, same
from observe_wandb_server import KEY, serving

from ecdit_train import cli
from ecdit_train.config.compose import compose
from ecdit_train.config.stored import freeze
from ecdit_train.errors import StorageError
from ecdit_train.evaluate.allocation import document
from ecdit_train.observe import wandb_sync
from ecdit_train.observe.figures import sample_grid
from ecdit_train.observe.routing_numbers import LayerNumbers, RoutingNumbers
from ecdit_train.observe.wandb_run import stable_id


@pytest.fixture(autouse=True)
def server(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with serving() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield stub


def _life(run, *, life, after, until, committed):
    sinks = opened(run, life=life, after=after)
    for step in range(after + 1, until + 1):
        sinks.log(step, {"train/loss": 1 / step, "life": life, "bad": float("nan")})
    sinks.committed(committed)
    sinks.close()


def _sync(run, *, upto, alive=False):
    return wandb_sync.sync(about(run, after=upto), asked(), alive=alive)


def test_what_was_offline_is_there_once_however_often_it_is_sent(tmp_path, server):
    _life(tmp_path, life=1, after=0, until=7, committed=5)
    sample_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a"], tmp_path / "samples/step_4.png")
    first = _sync(tmp_path, upto=5, alive=True)
    assert (first.had, first.has, first.rows, first.waiting, first.offline) == (0, 5, 5, 2, ())
    assert _sync(tmp_path, upto=5, alive=True).rows == 0
    _life(tmp_path, life=2, after=5, until=9, committed=9)
    result = {
        "step": 5,
        "overall": 0.25,
        "num_images": 8,
        "by_task": {"colors": 0.5},
        "chance_by_task": {"colors": 0.1},
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "shapes_00000005.json").write_text(json.dumps(result))
    spread = np.tile([3, 4, 1], (10, 1))
    layer = dict.fromkeys(("entropy", "edge_margin", "load", "gate", "timestep"), np.ones(2))
    RoutingNumbers(step=8, experts=2, layers={2: LayerNumbers(spread=spread, **layer)}).save(tmp_path)
    last = _sync(tmp_path, upto=9)
    assert (last.had, last.rows, last.waiting, last.evaluations, len(last.offline)) == (5, 4, 0, 1, 2)
    assert all(path.with_name(path.name + ".synced").exists() for path in run_files(tmp_path))
    again = _sync(tmp_path, upto=9)
    assert (again.rows, again.evaluations) == (0, 0)
    identity = stable_id(tmp_path)
    assert set(server.runs) == {identity, f"{identity}-shapes-5"}
    rows = server.runs[identity].history
    assert [row["_step"] for row in rows if "samples/grid" in row] == [4]
    ((step, counted),) = [(row["_step"], row[name]) for row in rows if (name := "routing/L2/experts_per_token") in row]
    assert (step, counted["_type"], counted["values"]) == (8, "histogram", [30, 40, 10])
    assert same([{k: v for k, v in row.items() if k not in ("samples/grid", name)} for row in rows], tmp_path)
    told = server.runs[f"{identity}-shapes-5"]
    assert (told.asked["jobType"], told.asked["groupName"]) == ("evaluate", "shapes_tiny")
    assert [(row["train/step"], row["eval/shapes/overall"]) for row in told.history] == [(5, 0.25)]
    result["overall"] = 0.5  # evaluated again
    (tmp_path / "evaluation" / "shapes_00000005.json").write_text(json.dumps(result))
    assert _sync(tmp_path, upto=9).evaluations == 1
    assert len(told.history) == 1, "no second point"
    assert told.summary["eval/shapes/overall"] == 0.5


def test_a_server_that_fails_is_one_error_and_nothing_is_marked(tmp_path, server, monkeypatch):
    _life(tmp_path, life=1, after=0, until=3, committed=3)
    server.trouble = "500"
    monkeypatch.setattr("ecdit_train.observe.wandb_run.START_SECONDS", 2.0)
    with pytest.raises(StorageError, match="W&B does not take"):
        _sync(tmp_path, upto=3)
    assert not list(tmp_path.glob("wandb/*/*.synced"))


def test_the_command_says_what_to_do_without_a_key(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY")
    freeze(compose(["experiment=shapes_tiny", f"run={tmp_path}", "observe/sinks=wandb"], local=False), tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["dash", "sync", str(tmp_path)])
    assert end.value.code == 77
    said = capsys.readouterr().err
    assert "wandb login" in said
    assert f"{tmp_path}/metrics.jsonl" in said


def test_the_command_tells_what_it_sent_and_what_waits(tmp_path, capsys, server):
    freeze(compose(["experiment=shapes_tiny", f"run={tmp_path}", "observe/sinks=wandb"], local=False), tmp_path)
    _life(tmp_path, life=1, after=0, until=3, committed=2)
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    for words, rows, waiting in (([], "2 sent", True), (["--all"], "1 sent", False)):
        with pytest.raises(SystemExit) as end:
            cli.main(["dash", "sync", str(tmp_path), *words])
        said = capsys.readouterr().out
        assert end.value.code == 0
        assert rows in said
        assert ("1 rows after the newest checkpoint" in said) == waiting
        assert f"{server.url}/me/ecdit/runs/{stable_id(tmp_path)}" in said


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_an_evaluation_is_sent_when_it_is_made(mode, tmp_path, server):
    path = tmp_path / "evaluation" / "shapes_00000005.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"step": 5, "overall": 0.25, "by_task": {}}))
    told = wandb_sync.evaluated(about(tmp_path), {"wandb": asked(mode=mode)}, path)
    assert told is not None
    if mode == "offline":
        assert "ecdit dash sync" in told
        assert not server.runs
    else:
        assert f"{stable_id(tmp_path)}-shapes-5" in told
        (run,) = server.runs.values()
        shown = run.summary["eval/shapes/overall"]
        # W&B's process puts the kinds of summary that were asked for in its place, now or a moment later.
        assert (shown["last"] if isinstance(shown, dict) else shown) == 0.25
    assert wandb_sync.evaluated(about(tmp_path), {}, path) is None


def test_an_evaluation_never_waits_long_for_a_server(tmp_path, server):
    server.trouble = "hang"
    path = tmp_path / "shapes_00000005.json"
    path.write_text(json.dumps({"step": 5, "overall": 0.25, "by_task": {}}))
    began = time.monotonic()
    told = wandb_sync.evaluated(about(tmp_path), {"wandb": asked(mode="online")}, path, seconds=4.0)
    assert time.monotonic() - began < 6
    assert "did not take it within 4 s" in str(told)


def test_an_allocation_is_a_table_and_a_picture(tmp_path, server):
    made = document({"true": allocated(seeds=3)}, step=5, layers=[2, 4, 6])
    path = tmp_path / "allocation" / "step_00000005.json"
    path.parent.mkdir()
    path.write_text(json.dumps(made))
    sample_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a"], path.with_suffix(".png"))
    _life(tmp_path, life=1, after=0, until=5, committed=5)
    assert _sync(tmp_path, upto=5).evaluations == 1
    assert _sync(tmp_path, upto=5).evaluations == 0
    told = server.runs[f"{stable_id(tmp_path)}-allocation-5"]
    (row,) = told.history
    assert (row["alloc"]["_type"], row["alloc"]["nrows"], row["alloc"]["ncols"]) == ("table-file", 6, 10)
    (table,) = [json.loads(content) for name, content in server.uploads.items() if "/alloc_" in name and "json" in name]
    assert table["columns"][:3] == ["layer", "t", "object mean"]
    assert table["data"][0] == [2, 0.25, 106.0, 6.0, 206.0, 6.0, 506.0, 306.0, 406.0, "true"]
    assert row["alloc_picture"]["_type"] == "image-file"
    assert row["eval/allocation/true_ratio"] == made["kinds"]["true"]["ratio"]
