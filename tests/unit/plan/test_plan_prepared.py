"""Prepared batches: the real trainer, loader and encoders on a CPU, every byte that is made for a batch counted as
long as it lives."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import configure, live
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from data_pipeline.contract import Batch
from ecdit_train.batches.encoded import EncodedBatches, Encoders
from ecdit_train.diffusion.encoders.hash_words import HashTextEncoder
from ecdit_train.plan import layout, memory, parameters
from ecdit_train.plan.prepared import prepared_batches

SELDOM = ("observe.log_every=50", "checkpoint.every_steps=50", "health.digest_every=0")
"""Nobody asks for a state at rest."""


class Living(TorchDispatchMode):
    """Bytes of the memory that was made while this was on, as long as anybody holds it; `most` is their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in given | self._known:
                self._meet(made.untyped_storage())
        return out

    def _meet(self, storage):
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key, nbytes):
        self._known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("batch", [(8, 4), (16, 2)], ids=["two_microbatches", "eight_microbatches"])
def test_three_batches_and_what_the_next_one_is_made_of(batch, tiny_shards, tmp_path, monkeypatch):
    cfg = configure(tmp_path, tiny_shards, *SELDOM, f"train.global_batch={batch[0]}", f"train.microbatch={batch[1]}")
    living, encode = Living(), EncodedBatches._encode
    # As copies to a device are: on a CPU torch would use the loader's memory.
    monkeypatch.setattr(EncodedBatches, "_sent", lambda self, array: torch.from_numpy(array).clone())

    def watched(self, batch):
        with living:
            return encode(self, batch)

    monkeypatch.setattr(EncodedBatches, "_encode", watched)
    vector = HashTextEncoder._vector

    def known(self, word):  # kept for good: part of the encoder
        with _disable_current_modes():
            return vector(self, word)

    monkeypatch.setattr(HashTextEncoder, "_vector", known)
    assert live(cfg).finished
    at = layout.resolve(cfg, world=1)
    planned = memory.estimate(cfg, parameters.count(cfg), at).prepared_batches
    assert planned == pytest.approx(living.most, rel=1e-3)
    # 16 x 16 pixels of 3 colours, 8 words of 32 numbers; pictures as bytes, and three times as numbers.
    assert planned == batch[0] * (2 * (4 * 768 + 8 * (32 * 4 + 1) + 8) + 13 * 768)


def test_presets_hold_four_on_a_gpu(cfg_of):
    """512 images of XL on a rank, latents (8, 32, 32) in fp32, 128 tokens of 2048 halves."""
    cfg = cfg_of("ec_dit_xl_8e")
    latents, text = 8 * 32 * 32 * 4, 128 * (2048 * 2 + 1)
    found = prepared_batches(cfg, layout.resolve(cfg, world=8))
    assert found == 512 * 4 * (latents + text + 8)


@pytest.mark.parametrize("text_tokens", [1, 128])
def test_a_batch_of_what_the_shards_hold(cfg_of, text_tokens):
    """One batch as it is made of halves: its text weighs most, or the copies of its latents do."""
    cfg = cfg_of("ec_dit_xl_8e", f"encoders.text.max_tokens={text_tokens}", "encoders.text.width=256")
    images, living = 512, Living()
    raw = Batch(
        position=np.arange(images),
        keys=(),
        latents=np.ones((images, 8, 32, 32), dtype=np.float16),
        text=np.ones((images, text_tokens, 256), dtype=np.float16),
        text_mask=np.ones((images, text_tokens), dtype=bool),
    )
    loader: Any = SimpleNamespace()
    none = Encoders(text=None, image=None)
    batches = EncodedBatches(loader, encoders=none, config=cfg.encoders, latent_side=32, device=torch.device("cpu"))
    batches._sent = lambda array: torch.from_numpy(array).clone()  # type: ignore[method-assign]
    with living:
        made = batches._encode(raw)
    image = living.now  # of all images: position, latents, text, mask
    assert made.features_BLX.dtype == torch.float16
    found = prepared_batches(cfg, layout.resolve(cfg, world=8))
    assert found == pytest.approx(3 * image + living.most, rel=1e-3)
    assert (living.most > image) == (text_tokens == 1)
