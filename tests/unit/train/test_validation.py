"""Held-out images are never trained on, and their loss is a function of the weights alone."""

from __future__ import annotations

import pytest
from tiny_runs import assert_same, configure, live, records

from ecdit_train import checkpoint
from ecdit_train.checkpoint import restore
from ecdit_train.errors import ConfigError
from ecdit_train.run_folder import CHECKPOINTS

HELD = ("validation.images=16", "validation.every_steps=4")


def keys_of(life):
    return {key for _, keys in life.seen for key in keys}


def test_held_out_images_are_never_trained_on(tiny_shards, tmp_path):
    """Over several epochs; the loader of the validation is watched too, so its batches are told apart by their positions."""
    trained, measured = set(), set()

    def meddle(trainer):
        for stream, keys in ((trainer.batches, trained), (trainer.validation.batches, measured)):
            fetch = stream.fetch

            def noted(fetch=fetch, keys=keys):
                raw = fetch()
                keys |= set(raw.keys)
                return raw

            stream.fetch = noted

    live(configure(tmp_path, tiny_shards, *HELD, "train.steps=40"), before=meddle)
    assert len(measured) == 16
    assert not trained & measured
    names = sorted(trained | measured)
    assert measured == set(names[-16:]), "the last of the data set"


def test_measuring_changes_nothing_and_depends_on_nothing_but_the_weights(tiny_shards, tmp_path):
    often = live(configure(tmp_path / "often", tiny_shards, "validation.images=16", "validation.every_steps=1"))
    seldom = live(configure(tmp_path / "seldom", tiny_shards, *HELD))
    assert_same(often.tensors, seldom.tensors)
    by_step = [
        {
            line["step"]: (line["eval/loss"], line["eval/loss_ema"])
            for line in records(tmp_path / run)
            if "eval/loss" in line
        }
        for run in ("often", "seldom")
    ]
    assert sorted(by_step[1]) == [4, 8, 12]
    assert {step: by_step[0][step] for step in by_step[1]} == by_step[1]
    assert by_step[1][4] != by_step[1][12]
    assert by_step[1][12][0] != by_step[1][12][1]


def test_a_step_without_a_log_line_gets_one_when_it_is_measured(tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, *HELD, "observe.log_every=5"))
    assert [line["step"] for line in records(tmp_path)] == [4, 5, 8, 10, 12]


def test_a_resumed_run_measures_the_same(tiny_shards, tmp_path):
    config = configure(tmp_path / "parts", tiny_shards, *HELD)
    live(config, stop_after=6)
    live(config)
    live(configure(tmp_path / "whole", tiny_shards, *HELD))
    losses = [[line.get("eval/loss") for line in records(tmp_path / run)] for run in ("parts", "whole")]
    assert losses[0] == losses[1]


def test_the_best_checkpoints_are_kept_by_it(tiny_shards, tmp_path):
    words = (
        "validation.images=16",
        "validation.every_steps=2",
        "checkpoint.every_steps=2",
        "checkpoint.keep=1",
        "checkpoint.keep_best=2",
    )
    live(configure(tmp_path, tiny_shards, *words, "optim.lr=3e-2", "train.steps=16"))
    measured = {line["step"]: line["eval/loss"] for line in records(tmp_path) if "eval/loss" in line}
    best = sorted(measured, key=lambda step: (measured[step], -step))[:2]
    kept = [committed.step for committed in checkpoint.find(tmp_path / CHECKPOINTS)]
    assert kept == sorted({*best, 16})
    assert restore.read_objects(checkpoint.newest(tmp_path / CHECKPOINTS))["validation"]["step"] == 16


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "validation.images=20",
            "validation.images = 20: must be a multiple of train.global_batch = 8; nearest valid: 16",
        ),
        (
            "checkpoint.keep_best=1",
            "checkpoint.keep_best = 1: the best are chosen by validation loss, and no images are held out",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(word, said, tiny_shards, tmp_path):
    with pytest.raises(ConfigError) as error:
        configure(tmp_path, tiny_shards, word)
    assert said in str(error.value)


def test_more_than_there_are_is_refused_with_what_there_is(tiny_shards, tmp_path):
    with pytest.raises(Exception, match=r"global_batch = 8: must be 1 to the number of samples"):
        live(configure(tmp_path, tiny_shards, "validation.images=80000"))
