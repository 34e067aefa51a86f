"""From a folder of pictures to a run, by the commands of docs/how-to/prepare-a-data-set.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_commands import ecdit, refused
from tiny_runs import WORDS, configure, live

from data_pipeline import views
from data_pipeline.manifest import open_view
from data_pipeline.reader import ShardReader
from ecdit_train.config.compose import compose

ENCODERS = [word for word in WORDS if word.startswith(("experiment=", "encoders.", "data."))]
STORED = ("encoders=shards", "encoders.text.width=32", "encoders.text.max_tokens=8", "encoders.image.channels=3",
          "encoders.image.factor=1")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_shards, tmp_path_factory) -> Path:
    """120 pictures with captions beside them, as a user has them; one is no picture."""
    view, folder = open_view(tiny_shards), tmp_path_factory.mktemp("pictures")
    reader = ShardReader(view)
    for number in range(120):
        raw = reader.read(number // 40, sample=number % 40)
        (folder / f"{number:03d}.png").write_bytes(bytes(raw.fields["png"]) if number != 7 else b"no picture")
        (folder / f"{number:03d}.txt").write_bytes(bytes(raw.fields["txt"]))
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "set"
    assert ecdit("data", "pack", folder, out, "resolution=16", "per_shard=32") == 0
    return out


def test_pack_says_what_became_of_every_picture(folder, tmp_path, capsys):
    capsys.readouterr()
    assert ecdit("data", "pack", folder, tmp_path / "set", "resolution=16", "per_shard=50") == 0
    said, progress = capsys.readouterr()
    lines = [line.split() for line in said.splitlines()]
    assert lines[0] == ["taken", "120", "samples"]
    assert lines[1] == ["kept", "119", "samples", "in", "3", "shards"]
    assert lines[2][:4] == ["rejected", "1", "samples:", "undecodable"]
    assert "007.png" in said
    assert "pack: 3/3 shards, 119 samples" in progress
    assert "1 rejected" in progress


def test_a_run_on_encoded_shards(packed, tmp_path, capsys):
    out = tmp_path / "encoded"
    assert ecdit("data", "encode", packed, out, *ENCODERS, "batch=8") == 0
    encoders = compose(ENCODERS, local=False).encoders
    text, codec = (slot.build(device="cpu", dtype=torch.float32) for slot in (encoders.text, encoders.image))
    batches = []
    config = configure(tmp_path / "run", out, *STORED, "train.steps=4")
    life = live(config, before=lambda trainer: batches.append((trainer.batches._first[0], trainer.batches._first[1])))
    assert life.finished
    raw, batch = batches[0]
    pictures = {}
    reader = ShardReader(open_view(packed))
    for shard, row in enumerate(open_view(packed).shards):
        for sample in range(row.n):
            one = reader.read(shard, sample=sample)
            pictures[one.key] = {name: bytes(payload) for name, payload in one.fields.items()}

    from data_pipeline.decode import decode_image
    from data_pipeline.errors import Where

    for row, key in enumerate(raw.keys):
        pixels = np.empty((1, 16, 16, 3), np.uint8)
        decode_image(pictures[key]["jpg"], out=pixels[0], where=Where("", key))
        torch.testing.assert_close(
            batch.latents_BCHW[row], codec.encode(torch.from_numpy(pixels))[0], rtol=0, atol=2e-3
        )
        features, mask = text.encode([pictures[key]["txt"].decode()])
        real = int(mask.sum())
        assert batch.mask_BL[row].sum() == real
        torch.testing.assert_close(batch.features_BLX[row, :real], features[0, :real].half(), rtol=0, atol=2e-3)


def test_other_encoders_are_refused_and_mistakes_come_together(packed, tmp_path, capsys):
    out = tmp_path / "encoded"
    assert ecdit("data", "encode", packed, out, *ENCODERS, "text=false") == 0
    assert set(open_view(out).fields) == {"latent.npy", "txt", "json"}
    code, lines = refused(capsys, "data", "encode", packed, out, *ENCODERS)
    assert code == 65
    assert "encoders: there" in lines[-1]
    code, lines = refused(capsys, "data", "encode", packed, out, *ENCODERS, "bach=8", "device=tpu", "batch=0")
    assert code != 0
    words = " ".join(lines)
    assert all(part in words for part in ("bach", "device", "batch"))
    code, lines = refused(capsys, "data", "encode", packed, out, *ENCODERS, "encoders=shards")
    assert "reads from shards, it makes nothing" in lines[-1]


def test_filter_dedup_and_report(packed, tmp_path, capsys):
    good, unique = tmp_path / "good.keep", tmp_path / "unique.keep"
    assert ecdit("data", "filter", packed, f"out={good}", "--where", "caption_length > 15") == 0
    assert ecdit("data", "dedup", packed, f"out={unique}", "distance=-1") == 0
    said = capsys.readouterr().out
    assert f"data.keep=[{good}]" in said
    clusters = [json.loads(line) for line in (tmp_path / "unique.keep.clusters.jsonl").read_text().splitlines()]
    assert all(len(cluster) > 1 for cluster in clusters)
    both = views.kept(open_view(packed), [good, unique]).mask()
    assert both.sum() == 119 - sum(len(cluster) - 1 for cluster in clusters)
    assert live(configure(tmp_path / "run", packed, f"data.keep=[{good},{unique}]", "train.steps=4")).finished
    code, lines = refused(capsys, "data", "filter", packed, f"out={good}", "--where", "widht > 3")
    assert code == 74
    assert "there are columns aspect, bytes, caption, caption_length" in lines[-1]
    assert ecdit("data", "report", packed) == 0
    assert (packed / "report.html").stat().st_size > 10_000


def test_parts_of_a_preparation(folder, packed, tmp_path, capsys):
    out = tmp_path / "set"
    assert ecdit("data", "pack", folder, out, "resolution=16", "per_shard=32", "--part", "2/2") == 0
    assert "part 2/2: done" in capsys.readouterr().out
    assert open_view(out).sha256 == open_view(packed).sha256


def test_stats_of_a_runs_words(packed, tmp_path, capsys):
    keep = tmp_path / "some.keep"
    view = open_view(packed)
    views.write_keep(view, np.arange(view.num_samples) < 100, reason="r", out=keep)
    words = [*ENCODERS, f"data.shards={packed}", f"data.keep=[{keep}]"]
    capsys.readouterr()
    assert ecdit("data", "stats", *words, "--global-batch", 32) == 0
    assert re.search(r"^data +119 +100 +100\.00 % +32\.00 +3\.0 steps +4$", capsys.readouterr().out, re.MULTILINE)
    code, lines = refused(capsys, "data", "stats", *words, "train.global_batch=101")
    assert (code, len(lines)) == (67, 1)
    code, lines = refused(capsys, "data", "stats", "data.order=streamed")
    assert "cannot be counted" in lines[-1]


def test_buckets_answers_mistakes(packed, tmp_path, capsys):
    code, lines = refused(capsys, "data", "buckets", packed, f"out={tmp_path}", "sizes=[16by16]")
    assert (code, "HEIGHTxWIDTH" in lines[-1]) == (67, True)
    code, lines = refused(capsys, "data", "buckets", packed, "sizes=[16x16]", "lest=3")
    assert all(any(part in line for line in lines) for part in ("least", "out=FOLDER"))
    assert not list(tmp_path.iterdir())
