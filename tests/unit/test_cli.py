"""The command: help, exit codes, and every mistake a user can make as one line that leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tiny_runs import records, words

import data_pipeline.errors
import launch.submit
from data_pipeline.manifest import index_folder
from ecdit_train import cli, errors

VERBS = {
    "train": ["WORD", "--stop-after", "experiment=shapes_tiny"],
    "resume": ["run", "WORD", "--stop-after"],
    "sample": [
        "KEY=VALUE",
        "prompts=@FILE",
        "guidance",
        "weights=ema|raw",
        "text_encoder=FOLDER",
        "image_codec=FOLDER",
    ],
    "evaluate": ["KEY=VALUE", "split=all|train|heldout", "tasks=", "text_encoder=FOLDER", "image_codec=FOLDER"],
    "report": ["report.html", "run"],
    "plan": ["--json", "--world", "--dry-run", "cluster="],
    "launch": ["--render-only", "sbatch"],
    "data": ["shapes", "index", "verify"],
    "data shapes": ["out=FOLDER", "count=N", "mix=task:weight"],
    "data index": ["folder", "manifest.json"],
    "data verify": ["folder", "every byte"],
    "config": ["show", "keys", "diff"],
    "config show": ["WORD"],
    "config keys": ["resume"],
    "config diff": ["old", "new"],
    "checkpoint": ["list", "verify"],
    "checkpoint list": ["run"],
    "checkpoint verify": ["run", "every byte"],
}


def ecdit(*argv: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in argv])
    return left.value.code


def refused(capsys, *argv: object) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr, each of which must name the program and the kind of error."""
    capsys.readouterr()
    code = ecdit(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("ecdit: ") for line in lines), lines
    return code, lines


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


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["config", "keys"]], ids=str)
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
    monkeypatch.setattr(cli, "report", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "x"])


def test_the_exit_code_is_left_for_the_job_script(monkeypatch, tmp_path):
    monkeypatch.setenv("ECDIT_EXIT_FILE", str(tmp_path / "code"))
    assert ecdit("resume", tmp_path / "nothing") == 79
    assert (tmp_path / "code").read_text() == "79\n"


# --- a whole journey -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """A run of 4 steps, made by the command. Read-only; copy it to change it."""
    run = tmp_path_factory.mktemp("cli") / "run"
    assert ecdit("train", *words(run, tiny_shards, "train.steps=4")) == 0
    return run


def test_from_shapes_to_report(tmp_path, capsys):
    run, shards = tmp_path / "run", tmp_path / "shards"
    assert ecdit("data", "shapes", f"out={shards}", "count=64", "resolution=16", "per_shard=16") == 0
    assert ecdit("data", "verify", shards) == 0
    assert ecdit("train", *words(run, shards, "train.steps=6", "observe.sample_every=3"), "--stop-after", 2) == 75
    assert f"go on with: ecdit resume {run}" in capsys.readouterr().out
    assert ecdit("resume", run) == 0
    assert [line["step"] for line in records(run)] == [1, 2, 3, 4, 5, 6]
    assert ecdit("checkpoint", "list", run) == 0
    assert ecdit("checkpoint", "verify", run) == 0
    assert "step 6: sound" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    assert ecdit("sample", f"run={run}", f"prompts=@{tmp_path / 'prompts.txt'}", "repeat=2", "scope=group",
                 "group_size=32", "weights=raw", "step=6", f"out={tmp_path / 'new' / 'grid.png'}") == 0  # fmt: skip
    assert (tmp_path / "new" / "grid.png").stat().st_size > 100
    assert ecdit("evaluate", f"run={run}", "tasks=single_object", "steps=1") == 0
    result = json.loads(next((run / "evaluation").glob("*.json")).read_text())
    assert result["step"] == 6
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


# --- mistakes: nothing is left behind ------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def spoil_missing(folder: Path) -> None:
    next(folder.glob("*.tar")).unlink()


def spoil_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_cut(folder: Path) -> None:
    tar = next(folder.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-5000])


def _rewrite(folder: Path, *, suffix: str, payload: bytes) -> None:
    """Every sample's member replaced, and indexed anew: the shards are whole, what is in them is not."""
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as old:
            members = [(m.name, old.extractfile(m).read()) for m in old.getmembers()]
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
            for name, data in members:
                data = payload if name.endswith(suffix) else data
                info = tarfile.TarInfo(name)
                info.size = len(data)
                import io

                new.addfile(info, io.BytesIO(data))
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    index_folder(folder)


def spoil_images(folder: Path) -> None:
    _rewrite(folder, suffix=".png", payload=b"\x89PNG\r\n\x1a\n not a picture")


def spoil_captions(folder: Path) -> None:
    _rewrite(folder, suffix=".txt", payload=b"caf\xe9 \xff\xfe")


SPOILT = {
    "no folder": (spoil_folder, 60, "MissingShard", "no manifest.json"),
    "no shard": (spoil_missing, 60, "MissingShard", "is missing in"),
    "cut tar": (spoil_cut, 61, "TruncatedShard", "must have"),
    "bad image": (spoil_images, 63, "UndecodableImage", "key"),
    "bad caption": (spoil_captions, 64, "BadCaption", "UTF-8"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_shards(fault, tiny_shards, tmp_path, capsys):
    """A new run folder is not made; an old one keeps every byte."""
    spoil, code, name, text = SPOILT[fault]
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    spoil(shards)
    run = tmp_path / "run"
    got, lines = refused(capsys, "train", *words(run, shards))
    assert (got, len(lines)) == (code, 1), lines
    assert lines[0].startswith(f"ecdit: {name}: ")
    assert text in lines[0]
    assert not run.exists()


@pytest.mark.parametrize("fault", ["no shard", "cut tar"])
def test_bad_shards_on_resume_change_nothing(fault, trained, tiny_shards, tmp_path, capsys):
    spoil, code, _, _ = SPOILT[fault]
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = files(run)
    spoil(shards)
    got, _ = refused(capsys, "resume", run, f"data.shards={shards}", "train.steps=9")
    assert got == code
    assert files(run) == before


def test_other_shards_than_the_run_began_with(trained, tiny_shards, tmp_path, capsys):
    """A copy of the same data elsewhere is fine, another data set is not."""
    from data_pipeline.shapes.make import make_shapes

    run = Path(shutil.copytree(trained, tmp_path / "run"))
    make_shapes(tmp_path / "other", count=200, resolution=16, seed=4, samples_per_shard=40)
    before = files(run)
    code, lines = refused(capsys, "resume", run, f"data.shards={tmp_path / 'other'}", "train.steps=5")
    assert code == 65
    assert "view_sha256" in lines[0]
    assert files(run) == before
    shutil.copytree(tiny_shards, tmp_path / "copy")
    assert ecdit("resume", run, f"data.shards={tmp_path / 'copy'}", "train.steps=5") == 0


def test_too_many_substitutes(tiny_shards, tmp_path, capsys):
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    spoil_images(shards)
    code, _ = refused(capsys, "train", *words(tmp_path / "run", shards, "data.on_bad=substitute"))
    assert code == 68


@pytest.mark.parametrize(("extra", "text"), [
    (["train.stepz=5"], "train.stepz = 5: unknown key; nearest valid: train.steps"),
    (["train.steps=five"], "train.steps = 'five': must be a whole number"),
    (["moe=expert_choise"], "nearest valid: expert_choice"),
    (["train.microbatch=3"], "train.microbatch = 3"),
    (["moe.experts=5"], "must be whole"),
    (["parallel.tp=2"], "parallel"),
    (["optim.warmup_steps=12"], "must be below train.steps = 12"),
])  # fmt: skip
def test_a_configuration_that_cannot_be(extra, text, tiny_shards, tmp_path, capsys):
    code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, *extra))
    assert code == 77
    assert any(text in line for line in lines), lines
    assert not (tmp_path / "run").exists()


def test_every_problem_at_once(tiny_shards, tmp_path, capsys):
    wrong = ("train.stepz=5", "optim.lr=fast", "data=paperr")
    code, lines = refused(capsys, "train", *words(tmp_path, tiny_shards, *wrong))
    assert code == 77
    assert len(lines) == 3


def test_encoders_without_weights(tiny_shards, tmp_path, capsys):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "t5" / "config.json").write_text("{}")
    for path, text in ((tmp_path / "t5", "no safetensors weights"), (tmp_path / "none", "is not a local folder")):
        code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "encoders.text.kind=t5",
                                                      f"encoders.text.path={path}"))  # fmt: skip
        assert (code, len(lines)) == (81, 1)
        assert text in lines[0]
    code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "encoders.image.kind=kl",
                                                  f"encoders.image.path={tmp_path / 't5'}"))  # fmt: skip
    assert (code, len(lines)) == (81, 1)
    assert not (tmp_path / "run").exists()


def test_shards_without_what_the_encoders_need(tiny_shards, tmp_path, capsys):
    code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "encoders.image.kind=shards"))
    assert (code, len(lines)) == (74, 1)
    assert "needs a member that the shards do not have; they hold" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", ["encoders.text.width=48", "model.layers=4", "train.seed=1",
                                   "diffusion.mask_ratio=0.0"])  # fmt: skip
def test_a_folder_of_another_run(extra, trained, tiny_shards, capsys):
    before = files(trained)
    for argv in (["train", *words(trained, tiny_shards, "train.steps=4", extra)], ["resume", trained, extra]):
        code, lines = refused(capsys, *argv)
        assert code == 79
        assert "another run; start a new run folder" in lines[-1]
    assert files(trained) == before


def test_a_folder_that_is_no_run(tmp_path, capsys):
    for argv in (["resume", tmp_path], ["resume", tmp_path / "none"], ["report", tmp_path / "none"],
                 ["sample", f"run={tmp_path}", "prompts=x"], ["evaluate", f"run={tmp_path}"],
                 ["checkpoint", "list", tmp_path], ["checkpoint", "verify", tmp_path],
                 ["config", "diff", tmp_path, tmp_path]):  # fmt: skip
        code, lines = refused(capsys, *argv)
        assert (code, len(lines)) == (79, 1), argv
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint(trained, tmp_path, capsys):
    shutil.copy(trained / "resolved.yaml", tmp_path)
    for argv in (["sample", f"run={tmp_path}", "prompts=a red circle"], ["evaluate", f"run={tmp_path}", "tasks=colors"],
                 ["checkpoint", "list", tmp_path], ["checkpoint", "verify", tmp_path]):  # fmt: skip
        code, lines = refused(capsys, *argv)
        assert (code, len(lines)) == (78, 1), argv
        assert "no committed checkpoint" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]


def test_a_damaged_checkpoint(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in (run / "checkpoints").glob("*/*.bin"):
        path.write_bytes(b"\0" * path.stat().st_size)
    drawing = ["sample", f"run={run}", "prompts=x"]
    for argv in (["resume", run, "train.steps=5"], drawing, ["checkpoint", "verify", run]):
        assert refused(capsys, *argv)[0] == 78, argv


@pytest.mark.parametrize(("argv", "text"), [
    (["sample", "prompt=x", "run=RUN"], "prompt = 'x': is not a key of this verb; nearest valid: prompts=..."),
    (["sample", "run=RUN"], "prompts = None: is required"),
    (["sample", "run=RUN", "prompts=|"], "at least one prompt"),
    (["sample", "run=RUN", "prompts=@/none"], "No such file"),
    (["sample", "run=RUN", "prompts=x", "steps=0"], "sample.steps"),
    (["sample", "run=RUN", "prompts=x", "steps=many"], "sample.steps"),
    (["sample", "run=RUN", "prompts=x", "scope=group", "group_size=7"], "sample.group_size"),
    (["sample", "run=RUN", "prompts=x", "sampler=eular"], "euler"),
    (["sample", "run=RUN", "prompts=x", "repeat=0"], "repeat"),
    (["sample", "run=RUN", "prompts=x", "step=last"], "step"),
    (["sample", "run=RUN", "prompts=x", "weights=best"], "must be one of ema, raw"),
    (["evaluate", "run=RUN", "tasks=colours"], "must be some of single_object"),
    (["evaluate", "run=RUN", "split=test"], "must be one of all"),
    (["evaluate", "run=RUN", "tasks=colors", "split=heldout"], "only color_attr is held out"),
    (["data", "shapes", "out=RUN/x", "count=0"], "count"),
    (["data", "shapes", "out=RUN/x", "count=1e3"], "must be a whole number"),
    (["data", "shapes", "out=RUN/x", "mix=colors"], "must be task:weight"),
    (["data", "shapes", "out=RUN/x", "scale=1"], "LOW,HIGH"),
    (["data", "shapes", "out=RUN/x", "format=gif"], "png, jpg"),
    (["data", "shapes"], "KEY=VALUE"),
])  # fmt: skip
def test_words_of_a_verb(argv, text, trained, capsys):
    before = files(trained)
    capsys.readouterr()
    code = ecdit(*(a.replace("RUN", str(trained)) for a in argv))
    error = capsys.readouterr().err
    assert code == (2 if text == "KEY=VALUE" else 77)
    assert text in error
    assert "Traceback" not in error
    assert files(trained) == before


def test_a_run_that_diverges(tiny_shards, tmp_path, capsys):
    """A rate that no weight survives: what was committed stays, the code says why."""
    code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "optim.lr=1e30", "optim.kind=rmsprop",
                                                  "checkpoint.every_steps=1"))  # fmt: skip
    assert (code, len(lines)) == (80, 1)
    assert "the update was not applied" in lines[0]
    assert ecdit("checkpoint", "verify", tmp_path / "run") == 0


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
    assert lines["optim.kind"] == ["identity", "one of rmsprop, adamw"]


def test_launch_shows_the_script_that_it_submits(tmp_path, monkeypatch, capsys):
    """And launching again may change what a resume may."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("experiment=shapes_tiny", "cluster.nodes=1", "cluster.gpus_per_node=2", "run=runs/r")
    for more in ((), ("cluster.time_limit=01:00:00",), ("train.steps=3000",)):
        assert ecdit("launch", *words, *more, "--render-only") == 0
        shown = capsys.readouterr().out
        assert ecdit("launch", *words, *more) == 83  # no sbatch here
        capsys.readouterr()
        assert (tmp_path / "runs" / "r" / "job.sh").read_text() == shown
    assert f"run={tmp_path}/runs/r\n" in shown
    assert "train.steps: 3000 -> " in refused(capsys, "launch", *words)[1][-1]
    assert refused(capsys, "launch", *words, "train.steps=3000", "train.seed=7")[0] == 79


def test_launch_render_only_writes_nothing(tmp_path, capsys):
    run = f"run={tmp_path / 'r'}"
    assert ecdit("launch", "experiment=ec_dit_xl_8e", "cluster=h100_ib400", run, "--render-only") == 0
    assert capsys.readouterr().out.startswith("#!")
    assert not (tmp_path / "r").exists()
