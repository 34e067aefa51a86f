"""Frozen encoders: the built-in ones, and T5 and AutoencoderKL from tiny random folders, as a user would have them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecdit_train.diffusion.encoders import kl
from ecdit_train.diffusion.encoders.hash_words import HashTextEncoder, HashWords
from ecdit_train.diffusion.encoders.identity import Identity, IdentityCodec
from ecdit_train.diffusion.encoders.stored import StoredLatents, StoredText
from ecdit_train.diffusion.encoders.t5 import T5
from ecdit_train.errors import EncoderError

TEXT = T5(path="", width=64, max_tokens=12, parameters=0)
IMAGE = Identity(scale=1.0, shift=0.0)
STORED = StoredLatents(path=None, channels=8, factor=4, scale=1.0, shift=0.0, parameters=0)
HERE = {"device": "cpu", "dtype": torch.float32}


# --- built in ------------------------------------------------------------------------------------------------------


def test_hash_features_are_fixed_and_tell_words_and_places_apart():
    captions = ["a red circle", "a circle, red!", "", "one two three four five six seven"]
    encoder = HashTextEncoder(width=64, max_tokens=5)
    features, mask = encoder.encode(captions)
    again, _ = HashTextEncoder(width=64, max_tokens=5).encode(captions[:1])
    assert torch.equal(features[:1], again)
    assert features.shape == (4, 5, 64)
    assert mask.sum(1).tolist() == [3, 3, 0, 5]
    assert (features[~mask] == 0).all()
    assert torch.equal(features[0, 0], features[1, 0]), "same word, same place"
    assert not torch.equal(features[0, 1], features[1, 2]), "same word, another place"
    words, _ = HashTextEncoder(width=512, max_tokens=1).encode(["red", "blue"])
    assert abs(float(words.std()) - 1.0) < 0.15
    assert abs(float(torch.corrcoef(words[:, 0])[0, 1])) < 0.3


def test_hash_features_do_not_depend_on_what_was_encoded_before_or_on_case():
    encoder = HashTextEncoder(width=32, max_tokens=4)
    encoder.encode(["blue triangles everywhere"])
    assert torch.equal(
        encoder.encode(["A Red Circle"])[0], HashTextEncoder(width=32, max_tokens=4).encode(["a red circle"])[0]
    )


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.1), (1.7, -0.3)])
def test_identity_codec_gives_every_byte_back(scale, shift):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    codec = IdentityCodec(replace(IMAGE, scale=scale, shift=shift))
    latents = codec.encode(pixels)
    assert latents.shape == (1, 3, 16, 16)
    assert latents.dtype == torch.float32
    assert torch.equal(codec.decode(latents), pixels)
    assert int(codec.decode(latents * 100).max()) == 255


def test_kinds():
    assert isinstance(HashWords(width=64, max_tokens=12).build(**HERE), HashTextEncoder)
    assert StoredText(width=64, max_tokens=12, parameters=0).build(**HERE) is None
    assert isinstance(IMAGE.build(**HERE), IdentityCodec)
    assert STORED.build(**HERE) is None


# --- T5 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> Path:
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("encoders") / "t5"
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)).save_pretrained(
        folder
    )
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def t5(folder: Path, **changes: object):
    return replace(TEXT, path=str(folder), **changes).build(**HERE)


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_t5_from_a_folder(t5_folder):
    from transformers import T5EncoderModel

    encoder = t5(t5_folder)
    features, mask = encoder.encode(["red", "a blue square of some length"])
    assert features.shape == (2, 12, 64)
    assert mask.sum(1).tolist() == [4, 12], "bytes and the end mark; cut at max_tokens"
    assert mask.dtype == torch.bool
    assert encoder.width == 64
    assert not features.requires_grad
    assert torch.equal(features, encoder.encode(["red", "a blue square of some length"])[0]), "no dropout"
    torch.testing.assert_close(encoder.encode(["red"])[0], features[:1])
    direct = T5EncoderModel.from_pretrained(t5_folder).eval()
    ids = torch.tensor([[byte + 3 for byte in b"red"] + [1]])
    torch.testing.assert_close(
        features[0, :4], direct(input_ids=ids).last_hidden_state[0].detach(), rtol=1e-4, atol=1e-5
    )


def test_t5_in_bf16(t5_folder):
    config = replace(TEXT, path=str(t5_folder))
    features, _ = config.build(device="cpu", dtype=torch.bfloat16).encode(["red"])
    assert features.dtype == torch.bfloat16


def test_missing_folder(tmp_path):
    for path in (None, str(tmp_path / "nowhere"), "google/flan-t5-large"):
        with pytest.raises(
            EncoderError, match=r"encoders\.text\.path: .* is not a local folder; download the model there first"
        ):
            replace(TEXT, path=path).build(**HERE)


def test_folder_without_safetensors_weights(t5_folder, tmp_path):
    folder = copy_of(t5_folder, tmp_path / "t5")
    weights = folder / "model.safetensors"
    weights.unlink()
    with pytest.raises(EncoderError, match="no safetensors weights"):
        t5(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="pickle files are refused"):
        t5(folder)


def test_wrong_width_names_the_right_one(t5_folder):
    with pytest.raises(EncoderError, match=r"encoders\.text\.width = 1024: .* 64 wide; nearest valid: 64"):
        t5(t5_folder, width=1024)


def test_folder_without_a_tokenizer_or_a_config(t5_folder, tmp_path):
    folder = copy_of(t5_folder, tmp_path / "t5")
    for file in (*folder.glob("tokenizer*"), folder / "added_tokens.json"):
        file.unlink(missing_ok=True)
    with pytest.raises(EncoderError, match="does not hold a tokenizer"):
        t5(folder)
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"no config\.json"):
        t5(folder)


def test_torn_weights(t5_folder, tmp_path):
    folder = copy_of(t5_folder, tmp_path / "t5")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match="does not hold a T5 encoder"):
        t5(folder)


def test_weights_of_another_model_are_not_replaced_by_random_ones(t5_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(t5_folder, tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 of its tensors \(encoder\.block\.1"):
        t5(folder)


# --- AutoencoderKL -------------------------------------------------------------------------------------------------

KL = kl.KL(path="", channels=8, factor=4, scale=0.7, shift=0.1, parameters=0)


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("encoders") / "vae"
    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(folder)
    return folder


def test_kl_from_a_folder(kl_folder):
    from diffusers import AutoencoderKL

    codec = replace(KL, path=str(kl_folder)).build(**HERE)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(pixels)
    assert latents.shape == (2, 8, 4, 4)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, codec.encode(pixels)), "the posterior's mean, not a draw"
    direct = AutoencoderKL.from_pretrained(kl_folder).eval()
    with torch.no_grad():
        mean = direct.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
        torch.testing.assert_close(latents, (mean - 0.1) * 0.7)
        picture = direct.decode(mean).sample
    decoded = codec.decode(latents)
    assert decoded.shape == (2, 16, 16, 3)
    assert decoded.dtype == torch.uint8
    expected = ((picture + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert (decoded.float() - expected).abs().max() <= 1


def test_kl_decodes_latents_that_shards_carry(kl_folder):
    assert replace(STORED, path=str(kl_folder)).build(**HERE).channels == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 4}, r"encoders\.image\.channels = 4: .* has 8; nearest valid: 8"),
        ({"factor": 8}, r"encoders\.image\.factor = 8: .* has 4; nearest valid: 4"),
    ],
)
def test_kl_of_another_shape(kl_folder, changes, message):
    with pytest.raises(EncoderError, match=message):
        replace(KL, path=str(kl_folder), **changes).build(**HERE)


def test_kl_without_usable_weights(kl_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(kl_folder, tmp_path / "vae")
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    removed = next(name for name in tensors if name.startswith("decoder.") and name.endswith("weight"))
    save_file({k: v for k, v in tensors.items() if k != removed}, weights, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 of its tensors"):
        replace(KL, path=str(folder)).build(**HERE)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(EncoderError, match="does not hold an AutoencoderKL"):
        replace(KL, path=str(folder)).build(**HERE)
    weights.unlink()
    with pytest.raises(EncoderError, match="no safetensors weights"):
        replace(KL, path=str(folder)).build(**HERE)
    with pytest.raises(EncoderError, match=r"encoders\.image\.path: .* is not a local folder"):
        replace(KL, path="").build(**HERE)


def test_a_t5_folder_is_not_a_codec(t5_folder):
    with pytest.raises(EncoderError, match="does not hold an AutoencoderKL"):
        replace(KL, path=str(t5_folder)).build(**HERE)
