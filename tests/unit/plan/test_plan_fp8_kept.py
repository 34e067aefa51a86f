"""What autograd keeps of the real network in 8 bits, byte by byte, against the plan's formulas; in bf16 beside it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers import fill
from ecdit_train.config.convert import with_values
from ecdit_train.model.embed import Text
from ecdit_train.model.fp8 import Fp8Product
from ecdit_train.parallel.low_precision import Fp8, apply_fp8
from ecdit_train.parallel.mesh import make_mesh
from ecdit_train.plan import activations, layout, low_precision, memory, parameters, slots

SMALL = (
    *("model.layers=4", "model.width=128", "model.heads=2", "model.kv_heads=1", "model.text_width=64"),
    *("encoders.text.width=32", "encoders.text.max_tokens=16", "parallel=single", "parallel.compile=false"),
    *("moe.form=plain", "train.microbatch=8", "train.global_batch=8", "train.precision=fp8"),
)
KINDS = {
    "gelu": ("ec_dit_xl_8e",),
    "gated": ("ec_dit_xl_8e", "moe/experts=swiglu"),
    "shared": ("ec_dit_xl_8e", "moe.shared_experts=1"),
    "gated_shared": ("ec_dit_xl_8e", "moe/experts=swiglu", "moe.shared_experts=1"),
    "dense": ("dense_xl",),
    "no_text": ("ec_dit_xl_8e", "model.cross_attention=false"),
}
RECIPES = ("current", "delayed", "mxfp8")


def network(cfg):
    """On the CPU in bf16, its products in 8 bits where the configuration says so."""
    model = slots.network(cfg).to_empty(device="cpu").to(torch.bfloat16)
    if cfg.train.recipe is not None:
        apply_fp8(model, Fp8.of(cfg.train), mesh=make_mesh(cfg.parallel, device_type="cpu", world=1))
        for module in model.modules():
            if isinstance(module, Fp8Product) and module.recipe == "delayed":
                module.reset_buffers()
    fill(model, seed=1)
    return model


def kept(model, cfg):
    """Bytes that live between forward and backward, each memory once, weights aside."""
    images, tokens, side = cfg.train.microbatch, slots.text_tokens(cfg), cfg.latent_side
    text = Text(
        features_BLX=torch.randn(images, tokens, slots.text_features(cfg)),
        mask_BL=torch.ones(images, tokens, dtype=torch.bool),
        drop_B=torch.zeros(images, dtype=torch.bool),
    )
    seen, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage  # held, so that no other gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prediction = model(
            torch.randn(images, slots.latent_channels(cfg), side, side),
            t_B=torch.rand(images),
            text=text,
            keep_BK=torch.arange(cfg.tokens_per_image).expand(images, -1),
            group_tokens=cfg.group_tokens,
        )
    assert prediction.patches_BKP.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_8_bits_keep_more_or_less(cfg_of, kind, recipe):
    words = (*KINDS[kind], *SMALL, f"train.fp8_recipe={recipe}", "train.fp8_backend=emulated")
    cfg = cfg_of(*words)
    wide = with_values(cfg, {"train.precision": "bf16"})
    at = layout.resolve(cfg, world=1)
    planned = activations.activations(cfg, at).kept - activations.activations(wide, at).kept
    bytes8, bytes16 = kept(network(cfg), cfg), kept(network(wide), wide)
    assert planned == pytest.approx(bytes8 - bytes16, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_delayed_remembers(cfg_of, kind):
    cfg = cfg_of(*KINDS[kind], *SMALL, "train.fp8_recipe=delayed", "train.fp8_backend=emulated")
    held = sum(b.nbytes for name, b in network(cfg).named_buffers() if name.endswith("fp8.amax") or ".fp8." in name)
    at = layout.resolve(cfg, world=1)
    assert held == low_precision.remembered(cfg, at) == memory.estimate(cfg, parameters.count(cfg), at).fp8_history > 0
