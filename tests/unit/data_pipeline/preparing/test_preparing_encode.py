"""Encoded shards: every sample as its encoder says, whoever encodes it, in whatever company."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from preparing_forms import REJECTED, content

from data_pipeline.decode import decode_array
from data_pipeline.errors import BadArray, DataError, Where, WrongView
from data_pipeline.parts import Part
from data_pipeline.preparing.encode import Encoded, EncodeRule, ToEncode, encode
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find
from data_pipeline.reader import ShardReader

RULE = EncodeRule(resolution=16, batch=4)


@dataclass(frozen=True)
class Toy:
    """Means of 4 x 4 pixels, and the letters of a caption; seven at most. Black pictures may come, others than it was given not."""

    huge: bool = False

    def __call__(self, number: int) -> Callable[[ToEncode], Encoded]:
        return self.run

    def run(self, batch: ToEncode) -> Encoded:
        assert batch.images.shape == (4, 16, 16, 3)
        assert len(batch.captions) == 4
        latents = batch.images.reshape(4, 4, 4, 4, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
        text, mask = np.zeros((4, 12, 2), np.float32), np.zeros((4, 12), bool)
        for row, caption in enumerate(batch.captions):
            letters = np.array([ord(letter) for letter in caption[:12]], np.float32)
            text[row, : len(letters), 0], mask[row, : len(letters)] = letters, True
        if self.huge:
            text[text == ord("8")] = 1e6
        return Encoded(latents=latents, text=text, mask=mask)


def made(source, folder, *, toy: Toy | None = None, identity: Mapping | None = None, **how):
    return encode(find(source), folder, rule=RULE, encoders=toy or Toy(), identity=identity or {"sha": "a"}, **how)


def stored(view) -> dict[str, dict[str, bytes]]:
    reader, found = ShardReader(view), {}
    for shard, row in enumerate(view.shards):
        for sample in range(row.n):
            raw = reader.read(shard, sample=sample)
            found[raw.key] = {name: bytes(payload) for name, payload in raw.fields.items()}
    return found


@pytest.fixture(scope="module")
def packed(forms, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "set"
    pack(find(forms["tars"]), folder, rule=PackRule(resolution=16, least=1, most_aspect=0))
    return folder


def test_what_is_stored_is_what_the_encoder_says(packed, tmp_path):
    done = made(packed, tmp_path)
    assert done.done.kept == done.done.taken == 14
    sources = stored(find(packed).view)
    for key, sample in stored(done.view).items():
        assert set(sample) == {"latent.npy", "text.npy", "txt", "json"}
        assert {"similarity", "pack"} <= json.loads(sample["json"]).keys()
        latent = decode_array(sample["latent.npy"], where=Where("", key))
        text = decode_array(sample["text.npy"], where=Where("", key))
        assert (latent.shape, latent.dtype, text.shape) == ((3, 4, 4), np.float16, (len(sample["txt"]), 2))
        assert text[:, 0].astype(int).tolist() == list(sources[key]["txt"])


def test_company_does_not_matter(packed, forms, tmp_path):
    """A sample in another shard, in another batch: the same bytes."""
    one = stored(made(packed, tmp_path / "one").view)
    many = find(packed).view
    from data_pipeline.prepare import RawMembers, write_shards

    others = [RawMembers(key=key, members=sample) for key, sample in stored(many).items()]
    write_shards(others[::-1], tmp_path / "in", samples_per_shard=9)
    assert stored(made(tmp_path / "in", tmp_path / "two").view) == one


@pytest.mark.parametrize(
    "how",
    [pytest.param({"runner": Local(workers=2)}, marks=pytest.mark.slow), {"part": Part(number=1, of=3)}],
    ids=["two", "part"],
)
def test_bytes_do_not_depend_on_who_encodes(packed, tmp_path, how):
    made(packed, tmp_path / "one")
    made(packed, tmp_path / "two", **how)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_rejections_are_counted(forms, tmp_path):
    """Of a source that was never packed; and where float16 is too small."""
    done = made(forms["tars"], tmp_path / "raw").done
    expected = {why: n for why, n in REJECTED.items() if why in ("undecodable", "no caption", "unreadable caption")}
    assert dict(done.rejected) == expected
    done = made(forms["tars"], tmp_path / "huge", toy=Toy(huge=True)).done
    assert done.rejected["not finite"] == 2  # 8 and 18
    assert done.taken == done.kept + done.rejected.total() == 20


def test_latents_alone_need_no_captions(forms, tmp_path):
    rule = EncodeRule(resolution=16, batch=4, no_caption="keep")
    done = encode(find(forms["tars"]), tmp_path, rule=rule, encoders=Toy(), identity={"sha": "a"})
    assert done.done.rejected["no caption"] == 0
    assert sum("txt" not in sample for sample in stored(done.view).values()) == 2


def test_other_encoders_are_refused(packed, tmp_path):
    made(packed, tmp_path)
    with pytest.raises(WrongView, match=r"encoders: there {'sha': 'a'}, asked {'sha': 'b'}"):
        made(packed, tmp_path, identity={"sha": "b"})


@dataclass(frozen=True)
class Wrong:
    def __call__(self, number: int) -> Callable[[ToEncode], Encoded]:
        return lambda batch: Encoded(latents=np.zeros((1, 3, 4, 4), np.float32))


def test_encoders_that_do_something_else(packed, tmp_path):
    with pytest.raises(BadArray, match=r"latents of shape \(1, 3, 4, 4\) for a batch of 4"):
        encode(find(packed), tmp_path, rule=RULE, encoders=Wrong(), identity={"sha": "a"})
    with pytest.raises(DataError, match="batch = 0"):
        EncodeRule(resolution=16, batch=0)
