"""What names encoders: their class, their values and their files, not where these lie."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from tiny_runs import WORDS

from data_pipeline.preparing.encode import ToEncode
from ecdit_train.batches.frozen import FrozenEncoders
from ecdit_train.config.compose import compose
from ecdit_train.errors import EncoderError


def encoders(*words: str):
    return compose([*WORDS, *words], local=False).encoders


def folder(path, content: bytes) -> str:
    path.mkdir()
    (path / "config.json").write_bytes(b"{}")
    (path / "model.safetensors").write_bytes(content)
    return str(path)


def test_identity(tmp_path):
    how = ("encoders/text=t5", "encoders.text.width=32", "encoders.text.max_tokens=8")

    def named(path: str, *more: str):
        return FrozenEncoders(config=encoders(*how, f"encoders.text.path={path}", *more)).identity()

    one, moved, other = (folder(tmp_path / n, c) for n, c in (("a", b"x"), ("b", b"x"), ("c", b"y")))
    assert named(one) == named(moved)
    assert named(one) != named(other)
    assert named(one) != named(one, "encoders.text.max_tokens=9")
    assert FrozenEncoders(config=encoders(*how, f"encoders.text.path={one}"), text=False).identity()["text"] is None


def test_scale_and_shift_do_not_count():
    """They are applied in training, so that they may be measured on what is stored."""
    config = encoders()
    moved = dataclasses.replace(config, image=dataclasses.replace(config.image, scale=3.0, shift=1.0))
    assert FrozenEncoders(config=config).identity() == FrozenEncoders(config=moved).identity()
    batch = ToEncode(images=np.full((2, 16, 16, 3), 200, np.uint8), captions=("a red circle", ""))
    first, second = (
        pickle.loads(pickle.dumps(FrozenEncoders(config=c, device="cpu")))(0)(batch) for c in (config, moved)
    )
    assert np.array_equal(first.latents, second.latents)
    assert first.mask.sum(1).tolist()[0] > 0


@pytest.mark.parametrize("words", [["encoders=shards"], ["encoders/text=shards"]])
def test_nothing_to_run(words):
    with pytest.raises(EncoderError, match="reads from shards, it makes nothing"):
        FrozenEncoders(config=encoders(*words))
