"""What Python gets is what the command line draws, and says, of the same run."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import configure, live

import ecdit_train
from ecdit_train import build, cli
from ecdit_train.errors import CheckpointError, ConfigError, RunFolderError
from ecdit_train.observe.journal import read_records
from ecdit_train.opened import open_run
from ecdit_train.parallel.runtime import start
from ecdit_train.run_folder import CHECKPOINTS

PROMPTS = ["a photo of a red circle", "a photo of a blue square", "a photo of a green triangle"]


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    config = configure(tmp_path_factory.mktemp("opened") / "run", tiny_shards, "train.steps=8")
    live(config)
    return config.run


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run, device="cpu")


def reference(run, *, kind="ema", step=None):
    config = open_run(run).config
    runtime = start("cpu")
    try:
        pipeline, step = build.build_pipeline(config, runtime, kind=kind, step=step)
        return pipeline.draw(PROMPTS, how=config.sample, step=step)
    finally:
        runtime.shutdown()


def said(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0


def test_the_package_itself_opens_runs_and_stays_light(run) -> None:
    assert ecdit_train.open_run is open_run
    code = "import sys, ecdit_train; assert 'torch' not in sys.modules; ecdit_train.open_run; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ecdit_train.nothing  # noqa: B018


@pytest.mark.parametrize(("kind", "step"), [("ema", None), ("raw", None), ("raw", 4)])
def test_it_draws_what_the_pipeline_draws(run, kind, step) -> None:
    drawn = open_run(run, weights=kind, step=step).draw(PROMPTS)
    wanted = reference(run, kind=kind, step=step)
    np.testing.assert_array_equal(drawn.images, wanted.images)
    np.testing.assert_array_equal(drawn.maps.chosen, wanted.maps.chosen)
    assert drawn.step == (step or 8)


def test_frames_are_what_was_seen_on_the_way(opened) -> None:
    frames = []
    drawn = opened.draw(PROMPTS, steps=4, timesteps=4, on_frame=frames.append)
    assert [round(f.t, 6) for f in frames] == [round(float(t), 6) for t in drawn.maps.timesteps]
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.counts, drawn.maps.counts[number])
        np.testing.assert_array_equal(frame.chosen, drawn.maps.chosen[number])
    # Euler's last step goes straight to the end, so what is seen last is the picture.
    np.testing.assert_array_equal(frames[-1].images, drawn.images)
    assert not np.array_equal(frames[0].images, drawn.images)
    np.testing.assert_array_equal(opened.draw(PROMPTS, steps=4).images, drawn.images)  # looking changes nothing


def test_an_exception_ends_the_drawing(opened) -> None:
    class EnoughError(Exception):
        pass

    def stop(frame):
        raise EnoughError

    with pytest.raises(EnoughError):
        opened.draw(PROMPTS, on_frame=stop)
    assert len(opened.draw(PROMPTS[0]).images) == 1


def test_words_change_what_they_say(opened) -> None:
    first = opened.draw(PROMPTS[0], seed=1)
    assert not np.array_equal(first.images, opened.draw(PROMPTS[0], seed=2).images)
    assert opened.draw(PROMPTS, repeat=2, guidance=1.0).images.shape[0] == 6
    assert first.how.seed == 1


def test_unknown_words_are_told(opened, run, capsys) -> None:
    assert opened.unknown_words(PROMPTS) == []
    assert [u.word for u in opened.unknown_words("a photo of a mauve circel")] == ["mauve", "circel"]
    assert str(opened.draw("a photo of a red circel").unknown[0]) == "'circel' (nearest: circle)"
    said(["sample", f"run={run}", "prompts=[a photo of a mauve circle]"])
    assert "no training caption had this word" in capsys.readouterr().err
    said(["sample", f"run={run}", "prompts=[a photo of a red circle]"])
    assert "caption" not in capsys.readouterr().err


def test_a_notebook_sees_pictures(opened) -> None:
    drawn = opened.draw(PROMPTS)
    shown = Image.open(io.BytesIO(drawn._repr_png_()))
    assert shown.size == drawn.grid().size
    assert len(drawn.pil()) == 3
    assert drawn.heatmap(1).size[0] > 300
    with pytest.raises(ConfigError, match="image"):
        drawn.heatmap(3)


def test_routing_of_pictures_that_are_there(opened) -> None:
    images = opened.draw(PROMPTS).images
    maps = opened.route(images, PROMPTS, timesteps=(0.2, 0.8))
    assert maps.counts.shape[:3] == (2, len(opened.config.sparse_layers), 3)
    assert maps.counts.mean() == pytest.approx(maps.capacity_factor)
    for t in range(2):
        assert (maps.experts_at(t, layer=0, image=1).sum(-1) == maps.counts[t, 0, 1]).all()
    again = opened.route(images, PROMPTS, timesteps=(0.2, 0.8), noise_seed=5)
    assert not np.array_equal(again.chosen, maps.chosen)
    with pytest.raises(ConfigError, match="uint8"):
        opened.route(images.astype(np.float32), PROMPTS)
    with pytest.raises(ConfigError, match="captions"):
        opened.route(images, PROMPTS[:2])


def test_records_are_the_runs(opened, run) -> None:
    assert opened.records() == read_records(opened.folder)
    assert opened.records()[-1]["step"] == 8


def test_an_exported_pipeline_draws_the_same(opened, run, tmp_path) -> None:
    said(["ckpt", "export", f"run={run}", f"out={tmp_path / 'pipe'}", "form=pipeline"])
    exported = open_run(tmp_path / "pipe", device="cpu")
    np.testing.assert_array_equal(exported.draw(PROMPTS).images, opened.draw(PROMPTS).images)
    assert exported.step == 8
    assert exported.records() == []
    assert exported.draw(PROMPTS).maps is not None
    with pytest.raises(ConfigError, match="one set of weights"):
        open_run(tmp_path / "pipe", step=4)


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"repeat": 0}, {"timesteps": 0}, {"scope": "world"}, {"guidance": float("nan")}]
)
def test_values_that_cannot_be(opened, given) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        opened.draw(PROMPTS, **given)
    with pytest.raises(ConfigError, match="prompts"):
        opened.draw([])


def test_it_may_be_opened_here_and_drawn_with_elsewhere(run, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(Path(run).parent)
    relative = open_run(Path(run).name, device="cpu")
    monkeypatch.chdir(tmp_path)
    assert relative.draw(PROMPTS[0]).images.shape[0] == 1


@pytest.mark.parametrize(("field", "value"), [("weights", "best"), ("device", "cuda")])
def test_what_cannot_be_opened_with(run, field, value) -> None:
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=field):
        open_run(run, **{field: value})


def test_folders_that_cannot_be_opened(run, tmp_path) -> None:
    with pytest.raises(RunFolderError, match="neither a run folder"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match="no committed checkpoint of step 5"):
        open_run(run, step=5).draw(PROMPTS)
    assert (build.Path(run) / CHECKPOINTS).is_dir()


def test_the_page_that_shows_it_runs_as_it_stands(run, capsys) -> None:
    """Its blocks follow each other, as in a notebook."""
    page = (Path(__file__).parents[2] / "docs/how-to/use-from-python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("runs/demo", run), names)
    assert "t = 0.00, 2.00 experts a patch" in capsys.readouterr().out
    assert names["losses"]
