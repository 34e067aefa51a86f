"""What a run may train on: stored latents and embeddings, real frozen encoders from local folders; masked or not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import assert_same, configure, live, records, steady

from data_pipeline.prepare import RawMembers, write_shards
from ecdit_train.build import build_pipeline
from ecdit_train.diffusion.encoders.hash_words import HashTextEncoder
from ecdit_train.errors import CheckpointError, ConfigError
from ecdit_train.parallel.runtime import start


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Latents (4, 8, 8) and word embeddings of different lengths instead of pictures and captions."""
    rng = np.random.default_rng(0)
    samples = [
        RawMembers(key=f"{i:06d}", members={
            "latent.npy": npy(rng.standard_normal((4, 8, 8)).astype(np.float16)),
            "text.npy": npy(rng.standard_normal((1 + i % 11, 32)).astype(np.float16))})
        for i in range(48)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("stored")
    write_shards(samples, folder, samples_per_shard=16)
    return folder


STORED = ("encoders/text=shards", "encoders/image=shards", "encoders.image.channels=4",
          "encoders.image.factor=2", "model.patch=2")  # fmt: skip


def test_stored_latents_and_embeddings(stored, tmp_path):
    config = configure(tmp_path / "whole", stored, *STORED, "moe.group_size=16", "observe.sample_every=4")
    whole = live(config)
    assert whole.finished
    assert not (tmp_path / "whole" / "samples").exists()  # nothing to draw with
    parts = configure(tmp_path / "parts", stored, *STORED, "moe.group_size=16")
    live(parts, stop_after=5)
    assert_same(live(parts).tensors, whole.tensors)
    assert steady(records(tmp_path / "parts")) == steady(records(tmp_path / "whole"))


def test_stored_latents_are_shifted_and_scaled(stored, tmp_path):
    """latent = (stored - shift) * scale."""
    batches = []
    for n, how in enumerate([(), ("encoders.image.scale=0.5", "encoders.image.shift=2.0")]):
        config = configure(tmp_path / str(n), stored, *STORED, *how, "train.steps=4")
        live(config, before=lambda trainer: batches.append(trainer.batches._first[1].latents_BCHW.clone()))
    torch.testing.assert_close(batches[1], (batches[0] - 2.0) * 0.5)


def test_drawing_from_stored_forms_needs_encoders(stored, tmp_path):
    config = configure(tmp_path, stored, *STORED, "train.steps=4")
    live(config)
    with pytest.raises(ConfigError, match="drawing needs a text encoder and a codec"):
        build_pipeline(config, start("cpu"), kind="ema", step=None)


def test_stored_embeddings_equal_the_encoder_that_made_them(tiny_shards, tmp_path):
    """Captions encoded beforehand train as captions encoded on the way, to the float32 that was stored."""
    from data_pipeline.manifest import open_view
    from data_pipeline.reader import ShardReader

    view, encoder = open_view(tiny_shards), HashTextEncoder(width=32, max_tokens=8)
    reader, samples = ShardReader(view), []
    for shard, size in enumerate(view.shard_sizes):
        for i in range(size):
            raw = reader.read(shard, sample=i)
            features, mask = encoder.encode([bytes(raw.fields["txt"]).decode()])
            text = features[0, : int(mask.sum())].numpy()
            samples.append(RawMembers(key=raw.key, members={"png": bytes(raw.fields["png"]), "text.npy": npy(text)}))
    write_shards(samples, tmp_path / "shards", samples_per_shard=40)
    # Of which the order is a function:
    assert list(open_view(tmp_path / "shards").shard_sizes) == list(view.shard_sizes)
    ahead = live(configure(tmp_path / "a", tmp_path / "shards", "encoders/text=shards", "train.steps=6"))
    onway = live(configure(tmp_path / "b", tiny_shards, "train.steps=6"))
    assert ahead.seen == onway.seen
    assert_same(ahead.tensors, onway.tensors)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    """A tiny random T5 encoder with ByT5's tokenizer, and a tiny AutoencoderKL: the real classes, made offline."""
    from diffusers import AutoencoderKL
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).save_pretrained(
        folder / "t5")  # fmt: skip
    ByT5Tokenizer().save_pretrained(folder / "t5")
    AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
                  sample_size=16).save_pretrained(folder / "vae")  # fmt: skip
    return folder


def test_real_encoders_from_local_folders(encoders, tiny_shards, tmp_path):
    """Raw pictures and captions through T5 and AutoencoderKL, stopped, resumed, drawn."""
    how = ("encoders/text=t5", f"encoders.text.path={encoders}/t5", "encoders.text.max_tokens=24",
           "encoders/image=kl", f"encoders.image.path={encoders}/vae", "encoders.image.channels=4",
           "encoders.image.factor=2", "model.patch=2", "train.steps=6")  # fmt: skip
    whole = live(configure(tmp_path / "whole", tiny_shards, *how))
    parts = configure(tmp_path / "parts", tiny_shards, *how, "observe.sample_every=3")
    live(parts, stop_after=2)
    assert_same(live(parts).tensors, whole.tensors)
    assert len(list((tmp_path / "parts" / "samples").glob("*.png"))) == 2
    here = start("cpu")
    pipeline, step = build_pipeline(parts, here, kind="raw", step=None)
    pictures = pipeline.draw(["a red circle", "a blue square", "a green cross"], how=parts.sample, step=step)
    assert pictures.images.shape == (3, 16, 16, 3)
    assert step == 6


def test_the_unmasked_stage_trains(tiny_shards, tmp_path):
    """Every patch is seen: groups of 16 tokens hold one image of 4 x 4 patches."""
    config = configure(tmp_path, tiny_shards, "diffusion.mask_ratio=0.0", "train.steps=6")
    assert config.tokens_per_image == config.patches_per_image == 16
    stopped = live(config, stop_after=3)
    life = live(config)
    assert (stopped.finished, life.finished) == (False, True)
    whole = live(configure(tmp_path / "whole", tiny_shards, "diffusion.mask_ratio=0.0", "train.steps=6"))
    assert_same(life.tensors, whole.tensors)


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_the_unmasked_stage_starts_from_a_masked_runs_average(decay, tiny_shards, tmp_path):
    """Weights and average begin as the other run's average (its raw weights if it keeps none); the optimizer is new."""
    average = f"optim.ema_decay={decay}"
    masked = live(configure(tmp_path / "masked", tiny_shards, "train.steps=6", average))
    config = configure(tmp_path / "unmasked", tiny_shards, "train.steps=6", average, "diffusion.mask_ratio=0.0",
                       f"train.init_from={tmp_path / 'masked'}")  # fmt: skip
    begun = {}

    def look(trainer):
        begun.update({name: t.clone() for name, t in trainer.state.tensors().items()})

    live(config, stop_after=2, before=look)
    source = "ema" if decay else "model"
    for name, t in begun.items():
        part, parameter = name.split("/", 1)
        expected = torch.zeros_like(t) if part.startswith("optim.") else masked.tensors[f"{source}/{parameter}"]
        assert torch.equal(t, expected), name
    resumed = live(config)  # from its own checkpoint, not from the other run again
    whole = live(configure(tmp_path / "whole", tiny_shards, "train.steps=6", average, "diffusion.mask_ratio=0.0",
                           f"train.init_from={tmp_path / 'masked'}"))  # fmt: skip
    assert_same(resumed.tensors, whole.tensors)


def test_nothing_to_start_from(tiny_shards, tmp_path):
    config = configure(tmp_path / "run", tiny_shards, f"train.init_from={tmp_path / 'none'}")
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        live(config)
    assert not (tmp_path / "run").exists()
