"""TensorBoard's files, read back by TensorBoard, are the run's own log; also after a kill and a roll-back."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecdit_train.config.compose import compose
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError
from ecdit_train.observe.figures import sample_grid
from ecdit_train.observe.journal import read_records
from ecdit_train.observe.sinks import SinkContext, open_sinks
from ecdit_train.observe.tensorboard_sink import TensorBoard

LIMITS = compose(["experiment=shapes_tiny"], local=False).observe.alerts


def opened(run, *, life=1, after=0, config=None):
    about = SinkContext(folder=run, name="n", config=config or {}, resume_step=after, life=life)
    return open_sinks(about, {"tensorboard": TensorBoard(flush_seconds=1)}, rank=0, life=life, limits=LIMITS)


def shown(run, name="train/loss"):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events, {event.step: event.value for event in events.Scalars(name)}


def test_what_tensorboard_shows_is_the_log_after_a_restart_and_a_roll_back(tmp_path):
    grid = sample_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a"], tmp_path / "samples/step_4.png")
    first = opened(tmp_path, config={"train": {"seed": 3}, "hub_token": "s3cr3t-abcdef"})
    for step in range(1, 9):
        first.log(step, {"train/loss": 1 / step, "note": "text", "bad": float("nan")})
    first.image(grid, key="samples/grid", step=4, caption="")
    first.close()
    second = opened(tmp_path, life=2, after=5)
    for step in range(6, 11):
        second.log(step, {"train/loss": 2.0})
    second.rewind(8)
    for step in range(9, 13):
        second.log(step, {"train/loss": 3.0})
    second.event("loss-spike", 12, "far above")
    second.close()
    events, values = shown(tmp_path)
    assert values == pytest.approx({r["step"]: r["train/loss"] for r in read_records(tmp_path)})
    (image,) = events.Images("samples/grid")
    assert (image.step, image.encoded_image_string) == (4, grid.read_bytes())
    texts = set(events.Tags()["tensors"])
    assert {"config/text_summary", "alerts/text_summary"} <= texts
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"s3cr3t" not in written


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    caplog.set_level(logging.WARNING, logger="ecdit.observe")
    sinks = opened(tmp_path)
    for step in range(1, 20):
        sinks.log(step, {"train/loss": 1.0})
    sinks.close()
    assert len([r for r in caplog.records if "TensorBoard" in r.getMessage()]) == 1
    assert len(read_records(tmp_path)) == 19


@pytest.mark.parametrize(("choice", "names"), [("tensorboard", ["tensorboard"]), ("both", ["tensorboard", "wandb"])])
def test_it_is_one_word_and_both_are_possible(choice, names):
    config = compose(["experiment=shapes_tiny", f"observe/sinks={choice}"], local=False)
    validate(config)
    assert sorted(config.observe.sinks) == names


def test_without_the_package_one_error_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    config = compose(["experiment=shapes_tiny", "observe/sinks=tensorboard"], local=False)
    with pytest.raises(ConfigError, match=r"pip install 'ecdit\[tensorboard\]'"):
        validate(config)
