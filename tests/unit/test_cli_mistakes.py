"""Every mistake a user can make: one line for each, an exit code, and nothing left behind."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from cli_commands import ecdit, files, refused
from tiny_runs import words

from data_pipeline.indexing import index_folder

# --- shards ------------------------------------------------------------------------------------------------------------


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
    (["moe.num_experts=5"], "must be whole"),
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
        code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "encoders/text=t5", "encoders.text.width=32",
                                                      "encoders.text.max_tokens=8",
                                                      f"encoders.text.path={path}"))  # fmt: skip
        assert (code, len(lines)) == (81, 1)
        assert text in lines[0]
    code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "encoders/image=kl",
                                                  "encoders.image.channels=3", "encoders.image.factor=1",
                                                  f"encoders.image.path={tmp_path / 't5'}"))  # fmt: skip
    assert (code, len(lines)) == (81, 1)
    assert not (tmp_path / "run").exists()


def test_shards_without_what_the_encoders_need(tiny_shards, tmp_path, capsys):
    code, lines = refused(
        capsys,
        "train",
        *words(
            tmp_path / "run",
            tiny_shards,
            "encoders/image=shards",
            "encoders.image.channels=3",
            "encoders.image.factor=1",
        ),
    )
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
                 ["ckpt", "ls", tmp_path], ["ckpt", "verify", tmp_path],
                 ["config", "diff", tmp_path, tmp_path]):  # fmt: skip
        code, lines = refused(capsys, *argv)
        assert (code, len(lines)) == (79, 1), argv
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint(trained, tmp_path, capsys):
    shutil.copy(trained / "resolved.yaml", tmp_path)
    for argv in (["sample", f"run={tmp_path}", "prompts=a red circle"], ["evaluate", f"run={tmp_path}", "tasks=colors"],
                 ["ckpt", "ls", tmp_path], ["ckpt", "verify", tmp_path]):  # fmt: skip
        code, lines = refused(capsys, *argv)
        assert (code, len(lines)) == (78, 1), argv
        assert "no committed checkpoint" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]


def test_a_damaged_checkpoint(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in (run / "checkpoints").glob("*/*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    drawing = ["sample", f"run={run}", "prompts=x"]
    for argv in (["resume", run, "train.steps=5"], drawing, ["ckpt", "verify", run]):
        assert refused(capsys, *argv)[0] == 78, argv


@pytest.mark.parametrize(("argv", "text"), [
    (["sample", "prompt=x", "run=RUN"], "prompt = 'x': is not a key of this verb; nearest valid: prompts\n"),
    (["sample", "run=RUN", "prompts=x", "guidance=3"], "guidance = 3: unknown key; nearest valid: sample.guidance\n"),
    (["sample", "run=RUN", "prompts=x", "model.width=3"], "this verb changes only sample, encoders"),
    (["sample", "run=RUN"], "prompts = None: is required"),
    (["sample", "run=RUN", "prompts=[]"], "at least one, as in"),
    (["sample", "run=RUN", "prompts=@/none"], "No such file"),
    (["sample", "run=RUN", "prompts=x", "sample.steps=0"], "sample.steps"),
    (["sample", "run=RUN", "prompts=x", "sample.steps=many"], "sample.steps"),
    (["sample", "run=RUN", "prompts=x", "sample.scope=group", "sample.group_size=7"], "sample.group_size"),
    (["sample", "run=RUN", "prompts=x", "sample/sampler=eular"], "nearest valid: euler"),
    (["sample", "run=RUN", "prompts=x", "repeat=0"], "repeat"),
    (["sample", "run=RUN", "prompts=x", "step=last"], "step"),
    (["sample", "run=RUN", "prompts=x", "weights=best"], "must be one of ema, raw"),
    (["evaluate", "run=RUN", "tasks=colours"], "must be one of single_object"),
    (["evaluate", "run=RUN", "split=test"], "must be one of all"),
    (["evaluate", "run=RUN", "tasks=colors", "split=heldout"], "only color_attr is held out"),
    (["data", "shapes", "out=RUN/x", "count=0"], "count"),
    (["data", "shapes", "out=RUN/x", "count=1e3"], "must be a whole number"),
    (["data", "shapes", "out=RUN/x", "mix=colors"], "must be {name: number, ...}"),
    (["data", "shapes", "out=RUN/x", "scale=1"], "[LOW,HIGH]"),
    (["data", "shapes", "out=RUN/x", "format=gif"], "png, jpg"),
    (["data", "shapes"], "WORD"),
])  # fmt: skip
def test_words_of_a_verb(argv, text, trained, capsys):
    before = files(trained)
    capsys.readouterr()
    code = ecdit(*(a.replace("RUN", str(trained)) for a in argv))
    error = capsys.readouterr().err
    assert code == (2 if text == "WORD" else 77)
    assert text in error
    assert "Traceback" not in error
    assert files(trained) == before


def test_a_run_that_diverges(tiny_shards, tmp_path, capsys):
    """A rate that no weight survives: what was committed stays, the code says why."""
    code, lines = refused(capsys, "train", *words(tmp_path / "run", tiny_shards, "optim.lr=1e30", "optim=rmsprop",
                                                  "checkpoint.every_steps=1"))  # fmt: skip
    assert (code, len(lines)) == (80, 1)
    assert "the update was not applied" in lines[0]
    assert ecdit("ckpt", "verify", tmp_path / "run") == 0
