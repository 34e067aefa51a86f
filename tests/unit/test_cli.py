"""The command: help, exit codes, a whole journey, planning and launching."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_commands import ecdit, files, refused
from tiny_runs import records, words

import data_pipeline.errors
import launch.submit
from ecdit_train import cli, errors

VERBS = {
    "train": ["WORD", "--stop-after", "experiment=shapes_tiny", "--config-dir", "--multirun", "--cfg", "--info"],
    "resume": ["run", "WORD", "--stop-after", "--config-dir"],
    "status": ["run folder", "--watch", "86 running, and a rank is silent"],
    "stop": ["run folder", "--timeout"],
    "doctor": ["WORD", "--json", "--config-dir", "90 where something does"],
    "logs": ["run folder", "--job", "--follow"],
    "sample": ["WORD", "prompts=@FILE", "sample.guidance", "weights=ema|raw", "encoders sections", "--config-dir"],
    "evaluate": ["WORD", "split=all|train|heldout", "tasks=[A,B,...]", "encoders sections"],
    "allocation": ["WORD", "seeds=N", "pictures=FOLDER", "Figure 6", "--config-dir"],
    "play": ["--step", "--weights", "--port", "127.0.0.1", "--config-dir"],
    "study": ["routing"],
    "study routing": ["arms=[A,B,...]", "size=small|gpu", "--config-dir"],
    "compare": ["run folders and sweep folders", "--html", "--png", "--tolerance", "--json"],
    "slots": ["routers", "--config-dir"],
    "report": ["report.html", "run", "--serve", "--port"],
    "merge": ["run=FOLDER, out=FOLDER", "last=N", "weights=uniform|linear"],
    "plan": ["--json", "--world", "--dry-run", "cluster=", "--config-dir"],
    "launch": ["--render-only", "sbatch", "--multirun", "--after", "--parsable"],
    "data": [
        "shapes",
        "index",
        "stats",
        "salvage",
        "keep",
        "takedown",
        "verify",
        "pack",
        "encode",
        "filter",
        "dedup",
        "buckets",
        "report",
    ],
    "data encode": ["IN", "batch=N", "experiment=ec_dit_xl_8e", "--config-dir", "--part I/N"],
    "data filter": ["SET", "--where", "out=FILE", "workers=N", "--part I/N"],
    "data dedup": ["SET", "out=FILE", "distance=BITS"],
    "data buckets": ["SET", "sizes=[HEIGHTxWIDTH,...]", "out=FOLDER", "least=N", "--part I/N"],
    "data report": ["SET", "out=FILE", "workers=N"],
    "data pack": ["IN", "resolution=PIXELS", "runner=local|ray", "--part I/N"],
    "data keep": ["FILE", "--keys", "--drop-keys", "data.keep", "--manifest"],
    "data takedown": ["FILE", "--keys", "data.take_down", "--manifest"],
    "data stats": ["folder", "fields", "--global-batch", "FOLDER|WORD"],
    "data salvage": ["TAR", "whole"],
    "data shapes": ["out=FOLDER", "count=N", "mix={task: weight, ...}", "--part I/N"],
    "submit": ["WORD", "--array", "--after", "--nproc", "--parsable", "--folder"],
    "data index": ["folder", "manifest.json"],
    "data verify": ["folder", "every byte"],
    "dash": ["sync", "apply", "show"],
    "dash apply": ["run folder", "--dry-run", "--project", "--entity"],
    "dash show": ["panels"],
    "dash sync": ["run folder", "--all", "--project", "--entity"],
    "config": ["show", "keys", "explain", "diff"],
    "config show": ["WORD", "--cfg"],
    "config explain": ["key"],
    "config keys": ["resume"],
    "config diff": ["old", "new"],
    "ckpt": ["ls", "verify", "diff", "export", "upcycle"],
    "ckpt ls": ["run", "age"],
    "ckpt verify": ["run", "every byte", "step=N"],
    "ckpt diff": ["old", "new", "exit code 1"],
    "ckpt export": ["run=FOLDER, out=FOLDER", "form=weights|pipeline", "weights=ema|raw", "--config-dir"],
    "ckpt upcycle": ["run=FOLDER, out=FOLDER", "router=normal|zeros", "moe=expert_choice", "--config-dir"],
}


def kinds() -> list[type]:
    """Every error class that says what the process returns."""
    found, todo = [], [errors.EcditError, data_pipeline.errors.DataError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return [kind for kind in found if "exit_code" in vars(kind)]


# --- help and exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    assert ecdit(*verb.split(), "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in VERBS[verb]), text


def test_help_names_every_verb_and_every_exit_code(capsys):
    assert ecdit("--help") == 0
    text = capsys.readouterr().out
    assert all(verb.split()[0] in text for verb in VERBS)
    lines = [line.split() for line in text.partition("exit codes:")[2].splitlines() if line]
    listed = {int(line[0]): line[1].rstrip(":") for line in lines}
    assert listed.keys() >= {0, 2, 75}
    named = {kind.exit_code: kind.__name__ for kind in kinds() if kind is not errors.EcditError}
    assert {code: name for code, name in listed.items() if code not in (0, 2, 75)} == named


def test_every_verb_is_tested_here():
    groups = cli.make_parser()._subparsers._group_actions[0].choices
    known = set(groups)
    for name, parser in groups.items():
        if parser._subparsers is not None:
            known |= {f"{name} {inner}" for inner in parser._subparsers._group_actions[0].choices}
    assert known == set(VERBS)


def test_exit_codes_are_distinct():
    codes = [kind.exit_code for kind in kinds()] + [errors.EXIT_OK, errors.EXIT_REQUEUE, 2]
    assert len(codes) == len(set(codes))
    assert launch.submit.SubmitError in kinds()
    assert all(0 <= code < 126 for code in codes)  # above: the shell's own and signals


def test_every_error_says_what_it_means():
    assert all((kind.__doc__ or "").strip().splitlines()[0].endswith(".") for kind in kinds())


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["--version"],
        ["config", "keys"],
        ["config", "show", "--cfg", "job"],
        ["config", "explain", "moe/router"],
        ["slots"],
        ["train", "--info", "defaults"],
        ["launch", "experiment=shapes_tiny", "cluster=local", "--render-only"],
    ],
    ids=str,
)
def test_looking_things_up_needs_no_torch(argv):
    code = ("import sys; from ecdit_train.cli import main\ntry: main(sys.argv[1:])\n"
            "except SystemExit as e: assert not e.code\n"
            "sys.exit(bool({'torch', 'wandb', 'matplotlib'} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_given_is_a_usage_error(capsys):
    assert ecdit() == 2
    assert ecdit("trian") == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch):
    monkeypatch.setattr(cli, "plan", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


def test_the_exit_code_is_left_for_the_job_script(monkeypatch, tmp_path):
    monkeypatch.setenv("ECDIT_EXIT_FILE", str(tmp_path / "code"))
    assert ecdit("resume", tmp_path / "nothing") == 79
    assert (tmp_path / "code").read_text().splitlines()[0] == "79"


# --- a whole journey -----------------------------------------------------------------------------------------------


def test_from_shapes_to_report(tmp_path, capsys):
    run, shards = tmp_path / "run", tmp_path / "shards"
    assert ecdit("data", "shapes", f"out={shards}", "count=64", "resolution=16", "per_shard=16") == 0
    assert ecdit("data", "verify", shards) == 0
    assert ecdit("train", *words(run, shards, "train.steps=6", "observe.sample_every=3"), "--stop-after", 2) == 75
    assert f"go on with: ecdit resume {run}" in capsys.readouterr().out
    assert ecdit("resume", run) == 0
    assert [line["step"] for line in records(run)] == [1, 2, 3, 4, 5, 6]
    assert ecdit("ckpt", "ls", run) == 0
    assert ecdit("ckpt", "verify", run) == 0
    assert "step 6: sound" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    assert ecdit("sample", f"run={run}", f"prompts=@{tmp_path / 'prompts.txt'}", "repeat=2", "sample.scope=group",
                 "sample.group_size=32", "weights=raw", "step=6", f"out={tmp_path / 'new' / 'grid.png'}") == 0  # fmt: skip
    assert (tmp_path / "new" / "grid.png").stat().st_size > 100
    assert ecdit("evaluate", f"run={run}", "tasks=single_object", "sample.steps=1") == 0
    result = json.loads(next((run / "evaluation").glob("*.json")).read_text())
    assert result["step"] == 6
    assert 0 < result["timestep_share_L2"] < 1
    assert result["experts_per_token"] == result["budget"] == 2.0  # expert choice spends exactly what is planned
    assert ecdit("report", run) == 0
    assert "single_object" in (run / "report.html").read_text()
    assert ecdit("config", "diff", run, run) == 0


def test_a_moved_run_is_resumed_where_it_is(trained, tmp_path, monkeypatch):
    """Not where its configuration says it was made; nothing appears at the old place."""
    shutil.copytree(trained, tmp_path / "here" / "moved")
    monkeypatch.chdir(tmp_path / "here")
    before = files(trained)
    assert ecdit("resume", "moved", "train.steps=5") == 0
    assert [line["step"] for line in records(tmp_path / "here" / "moved")] == [1, 2, 3, 4, 5]
    assert ecdit("sample", "run=moved", "prompts=a red circle") == 0
    assert len(list((tmp_path / "here" / "moved" / "pictures").iterdir())) == 1
    assert files(trained) == before


def test_train_goes_on_in_a_folder_that_has_checkpoints(trained, tiny_shards, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert ecdit("train", *words(run, tiny_shards, "train.steps=5")) == 0
    assert [line["step"] for line in records(run)] == [1, 2, 3, 4, 5]


# --- planning, listing, launching ------------------------------------------------------------------------------------


def test_plan_from_a_login_node(capsys):
    assert ecdit("plan", "experiment=ec_dit_m_64e", "cluster=h100_ib400", "cluster.nodes=8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["experiment"] == "ec_dit_m_64e"
    assert ecdit("plan", "experiment=ec_dit_m_64e", "cluster=h100_ib400", "cluster.nodes=8") == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("world", [0, -2])
def test_plan_for_no_ranks(world, capsys):
    code, lines = refused(capsys, "plan", "experiment=shapes_tiny", f"--world={world}")
    assert (code, lines) == (77, [f"ecdit: ConfigError: world = {world}: must be at least 1; nearest valid: 1"])


@pytest.mark.parametrize("within", [True, False])
def test_a_dry_run_says_whether_the_plan_holds(within, monkeypatch, capsys):
    from ecdit_train.plan import dry_run

    checked = dry_run.Checked(document={"differences": []}, text="off\n", within=within)
    monkeypatch.setattr(dry_run, "check", lambda plan: checked)
    for more in ((), ("--json",)):
        assert ecdit("plan", "experiment=shapes_tiny", "--world=2", "--dry-run", *more) == int(not within)
        assert ("differences" if more else "off") in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "text"), [
    (["--nproc", "0", "train"], "--nproc: '0' is not a whole number, 1 or more"),
    (["--nproc=-3", "train"], "--nproc: '-3' is not a whole number"),
    (["--nproc", "two", "train"], "--nproc: 'two' is not a whole number"),
    (["--nproc", "2", "plan"], "--nproc: only for train, resume, sample, evaluate"),
    (["--nproc", "2", "config", "keys"], "--nproc: only for"),
    (["--nproc", "2", "report", "x"], "--nproc: only for"),
])  # fmt: skip
def test_ranks_that_cannot_be(argv, text, capsys):
    assert ecdit(*argv) == 2
    assert text in capsys.readouterr().err


def test_keys_with_type_and_class(capsys):
    assert ecdit("config", "keys") == 0
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["train.steps"] == ["schedule", "a whole number"]
    assert lines["optim.optimizer._target_"] == ["identity", "text"]
    assert ecdit("config", "keys", "moe=token_choice") == 0
    assert "moe.router.top_k" in capsys.readouterr().out


@pytest.fixture
def login(tmp_path, monkeypatch) -> Path:
    """A working directory with a data set on a machine whose Slurm takes every job."""
    monkeypatch.chdir(tmp_path)
    for name, body in (("sbatch", "echo 4711"), ("scontrol", "echo away >&2; exit 1"), ("squeue", "true")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "data" / "shapes").mkdir(parents=True)
    (tmp_path / "data" / "shapes" / "manifest.json").write_text("{}")
    return tmp_path


def test_launch_shows_what_it_submits(login, capsys):
    """And launching again may change what a resume may."""
    words = ("experiment=shapes_tiny", "cluster.nodes=1", "cluster.gpus_per_node=2", "run=runs/r")
    run = login / "runs" / "r"
    for more in ((), ("cluster.time_limit=01:00:00",), ("train.steps=3000",)):
        assert ecdit("launch", *words, *more, "--render-only") == 0
        shown = capsys.readouterr()
        assert "the cluster was not checked: scontrol said: away" in shown.err
        assert ecdit("launch", *words, *more) == 0
        assert capsys.readouterr().out.startswith("job 4711 submitted: runs/r\n")
        assert shown.out.startswith((run / "job.sh").read_text())
        assert all(f"# {line}".strip() in shown.out for line in (run / "job.json").read_text().splitlines())
    assert f"run={run}\n" in shown.out
    assert "train.steps: 3000 -> " in refused(capsys, "launch", *words)[1][-1]
    assert refused(capsys, "launch", *words, "train.steps=3000", "train.seed=7")[0] == 79


def test_launch_without_slurm_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, lines = refused(capsys, "launch", "experiment=shapes_tiny", "run=runs/r")
    assert (code, len(lines)) == (83, 1)
    assert "sbatch was not found; use a Slurm login node" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_launch_refuses_what_does_not_fit_into_the_gpus(login, capsys):
    """As `ecdit plan` computes it; and a look says so too."""
    words = ("experiment=ec_dit_m_64e", "cluster=h100_ib400", "cluster.nodes=1", "encoders=shards", "data.shards=data/shapes",
             "parallel.ep=8")  # fmt: skip
    code, lines = refused(capsys, "launch", *words)
    assert code == 77
    (line,) = [line for line in lines if "ConfigError" in line]
    assert "cluster.gpu_memory = 80000000000.0: fits: NO" in line
    assert "smallest that fits: 4 nodes" in line
    assert ecdit("launch", *words, "--render-only") == 0
    assert "would be refused: cluster.gpu_memory" in capsys.readouterr().err
    assert not (login / "runs").exists()


def test_launch_render_only_writes_nothing(tmp_path, capsys):
    run = f"run={tmp_path / 'r'}"
    assert ecdit("launch", "experiment=ec_dit_xl_8e", "cluster=h100_ib400", run, "--render-only") == 0
    assert capsys.readouterr().out.startswith("#!")
    assert not (tmp_path / "r").exists()


def test_a_full_disk_is_one_line_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a.tar"))

    monkeypatch.setattr("data_pipeline.stats.look", full)
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "stats", str(tmp_path)])
    assert left.value.code == 87
    assert "a.tar: No space left on device; make room" in capsys.readouterr().err
