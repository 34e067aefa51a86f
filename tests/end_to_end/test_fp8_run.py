"""A run whose products are of 8-bit operands: stopped and resumed, its scales and what they remember are those of the run that was
never stopped, bit for bit."""

import pytest
import torch
from tiny_runs import assert_same, configure, live, records, steady

HOW = {
    "delayed": ("train.fp8_recipe=delayed", "train.fp8_backend=emulated"),
    "mxfp8": ("train.fp8_recipe=mxfp8", "train.fp8_backend=emulated"),
}


@pytest.mark.parametrize("recipe", HOW)
def test_stopped_and_resumed_in_8_bits(recipe, tiny_shards, tmp_path):
    words = ("train.precision=fp8", *HOW[recipe], "train.steps=6")
    whole = live(configure(tmp_path / "whole", tiny_shards, *words))
    config = configure(tmp_path / "cut", tiny_shards, *words)
    lives = [live(config, stop_after=stop) for stop in (2, 5, None)]
    assert lives[-1].finished
    assert steady(records(tmp_path / "cut")) == steady(records(tmp_path / "whole"))
    assert_same(lives[-1].tensors, whole.tensors)
    remembered = [t for name, t in whole.tensors.items() if name.startswith("buffer/") and name.endswith(".amax")]
    if recipe == "mxfp8":
        assert not remembered
        return
    assert remembered
    for amax in remembered:  # six steps of x, newest first; W and dy are 0 at first where a weight starts at 0
        assert (amax[:, 0, :6] > 0).all()
        assert (amax[:, 0, 6:] == 0).all()


def test_8_bits_learn_as_16_do(tiny_shards, tmp_path):
    """The same weights, data and draws: losses of twelve steps."""
    losses = {}
    for name in ("bf16", "fp8"):
        live(configure(tmp_path / name, tiny_shards, f"train.precision={name}", "train.fp8_backend=emulated"))
        losses[name] = torch.tensor([line["train/loss"] for line in records(tmp_path / name)])
    difference = ((losses["fp8"] - losses["bf16"]) / losses["bf16"]).abs()
    assert 0 < difference.max() < 0.02
