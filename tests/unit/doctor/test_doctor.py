"""`ecdit doctor`: its table, its exit code, and that no check can hold up or end another one."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from cli_commands import ecdit, refused
from tiny_runs import configure, words

from ecdit_train.config.stored import freeze
from ecdit_train.doctor import findings, software, verb
from ecdit_train.doctor.findings import Check, fail, ok, warning


def test_a_check_that_hangs_and_one_that_raises_end_no_other():
    def breaks():
        yield ok("a", "said before")
        raise OSError("the disk is gone")

    began = time.monotonic()
    found = findings.run([
        Check(what="hangs", ask=lambda: time.sleep(60), seconds=0.3, hangs="ask its operators"),
        Check(what="breaks", ask=breaks),
        Check(what="well", ask=lambda: [ok("well", "all")]),
    ])  # fmt: skip
    assert time.monotonic() - began < 20
    assert [(one.what, one.state) for one in found] == [("hangs", "warning"), ("breaks", "warning"), ("well", "ok")]
    assert (found[0].found, found[0].fix) == ("no answer within 0.3 s", "ask its operators")
    assert found[1].found == "could not be checked: OSError: the disk is gone"


def test_the_slowest_check_is_all_that_is_waited_for():
    began = time.monotonic()
    slow = [Check(what=str(n), ask=lambda: [time.sleep(0.5) or ok("x", "")]) for n in range(8)]  # type: ignore[func-returns-value]
    assert len(findings.run(slow)) == 8
    assert time.monotonic() - began < 3


def test_no_secret_is_shown():
    token = "ghp_" + "a" * 36
    (one,) = findings.run(
        [Check(what="x", ask=lambda: [fail("x", f"http://me:pw1234@proxy {token}", f"unset {token}")])]
    )
    assert token not in one.found + one.fix
    assert "pw1234" not in one.found


def test_the_table_says_how_to_mend():
    text = verb.table([ok("disk", "much"), warning("mount", "nfs", "another"), fail("write", "no", "make room")])
    assert text.splitlines() == [
        "ok       disk   much",
        "warning  mount  nfs",
        "                -> another",
        "fail     write  no",
        "                -> make room",
        "",
        "1 ok, 1 warning, 1 fail",
    ]


@pytest.fixture
def quick(monkeypatch):
    """Without torch and ranks, which are tested by themselves."""
    monkeypatch.setattr(software, "checks", lambda **_: [Check(what="python", ask=software.python)])


def test_a_run_that_is_well(quick, tiny_shards, tmp_path, capsys):
    run = tmp_path / "run"
    freeze(configure(run, tiny_shards), run)
    assert ecdit("doctor", run) == 0
    out = capsys.readouterr().out
    table = dict(line.split(maxsplit=2)[1:] for line in out.splitlines() if line.startswith("ok"))
    assert table["shards"].startswith("200 samples in 5 shards")
    assert "checkpoints of" in table["disk"]
    assert table["rename"] == "atomic for files and folders"
    assert "\nfail " not in out
    assert list(run.iterdir()) == [run / "resolved.yaml"], "nothing is left there"


def test_what_fails_is_the_exit_code(quick, tiny_shards, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    freeze(configure(run, tiny_shards), run)
    monkeypatch.setattr(verb.inputs, "checkpoint_bytes", lambda _: 1e6)
    assert refused(capsys, "doctor", run, f"data.shards={tmp_path}/nowhere")[0] == 90
    code, lines = refused(capsys, "doctor", *words(run, tmp_path / "nowhere"))
    assert code == 90
    assert lines[-1].startswith("ecdit: UnfitError: 1 of ")
    assert lines[-1].endswith(" checks failed: inputs")


def test_json(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ecdit("doctor", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["worst"] in ("ok", "warning")
    assert {tuple(sorted(one)) for one in said["checks"]} == {("fix", "found", "state", "what")}
    assert {"python", "port", "disk", "fsync", "wandb"} <= {one["what"] for one in said["checks"]}


def test_a_wrong_configuration_is_a_finding(quick, tmp_path, capsys):
    """And the rest is asked all the same."""
    code = ecdit("doctor", "experiment=shapes_tiny", "train.step=3")
    out = capsys.readouterr().out
    assert code == 90
    assert out.startswith("fail     configuration  train.step = ")
    assert "ok       port" in out


def test_no_run_there(tmp_path, capsys):
    code, lines = refused(capsys, "doctor", tmp_path / "none")
    assert (code, "is not a run folder" in lines[0]) == (79, True)


def test_ranks_of_an_image_are_not_judged_by_this_interpreter(tmp_path):
    from dataclasses import replace

    cfg = configure(tmp_path, "nowhere")
    told = verb.every(replace(cfg, cluster=replace(cfg.cluster, container="image.sif")), folder=None)
    assert [check.what for check in told][:3] == ["python", "torch", "host name"]
    (one,) = told[1].ask()
    assert "in image.sif; not looked at" in one.found


def test_the_process_itself_imports_no_torch():
    code = (
        "import sys; from ecdit_train.doctor import verb; verb.every(None, folder=None); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
