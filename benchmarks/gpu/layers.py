"""The sparse layer and whole blocks, as one rank of each preset sees them, against their own matrix products.

FLOPs are those of the mathematics, forward and backward (3 times the forward): what a form computes again is its own time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.model.embed import Conditioning
from ecdit_train.plan.flops import per_step

from .device import Device
from .rank import Part, fake_world, layouts, part, presets, tokens, with_words
from .record import Findings

FORMS: dict[str, tuple[str, ...]] = {
    "plain": ("moe/dispatcher=index_add",),
    "deterministic": ("moe/dispatcher=deterministic",),
    "triton": ("moe/dispatcher=triton",),
    "lean": ("moe/dispatcher=index_add", "moe.form=lean"),
    "lean, triton": ("moe/dispatcher=triton", "moe.form=lean"),
    "plain, compiled": ("moe/dispatcher=index_add", "parallel.compile=true"),
    "fp8": ("moe/dispatcher=triton", "train.precision=fp8", "moe.form=plain"),
    "fp8, transformer engine": (
        *("moe/dispatcher=triton", "train.precision=fp8", "moe.form=plain"),
        "train.fp8_backend=transformer_engine",
    ),
}
"""The layer's forms, as words of a command line; those that this version does not know are skipped, each with its reason."""

BLOCKS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "eager, triton": ("moe/dispatcher=triton",),
    "compiled": ("parallel.compile=true",),
}
TWO_BLOCKS = ("model.layers=2",)
EAGER = ("parallel.compile=false",)
"""Unless a form says otherwise: presets compile."""


def layers(device: Device, found: Findings) -> None:
    """The layer's TFLOP/s against torch.bmm of the same shapes: the best form reaches 85 %."""
    for preset in layouts(device):
        best = 0.0
        for form, words in FORMS.items():
            with found.part(f"{preset.name}, {form}"):
                config = with_words(preset, (*TWO_BLOCKS, *EAGER, *words))
                with fake_world(preset.world):
                    row = layer_against_bmm(part(config, device, world=preset.world), device)
                found.values[f"{preset.name}, {form}"] = row
                best = max(best, row["bmm / layer"])
        if best and device.cuda:
            found.at_least(f"{preset.name}: best form / bmm", best, 0.85)


def layer_against_bmm(made: Part, device: Device) -> dict[str, float]:
    c, layer = made.config, made.moe
    x = tokens(c, device)
    (e, R), D = made.rows, c.model.width
    hidden = round(c.expert_ratio * D)
    up, down = (torch.randn(e, *shape, device=device.kind, dtype=x.dtype) for shape in ((D, hidden), (hidden, D)))
    weights = [nn.Parameter(w * 0.02) for w in (up, down)]
    rows = torch.randn(e, R, D, device=device.kind, dtype=x.dtype, requires_grad=True)
    grad, grad_rows = torch.randn_like(x), torch.randn_like(rows)

    def whole() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x, group_tokens=c.group_tokens)[0].backward(grad)

    def products() -> None:
        rows.grad = weights[0].grad = weights[1].grad = None
        h = F.gelu(torch.bmm(rows, weights[0]), approximate="tanh")
        torch.bmm(h, weights[1]).backward(grad_rows)

    def bare() -> None:
        """The six products of forward and backward, and nothing else."""
        h = torch.bmm(rows.detach(), weights[0].detach())
        torch.bmm(h, weights[1].detach())
        dh = torch.bmm(grad_rows, weights[1].detach().mT)
        torch.bmm(h.mT, grad_rows)
        torch.bmm(dh, weights[0].detach().mT)
        torch.bmm(rows.detach().mT, dh)

    seconds = device.seconds(
        {"layer": whole, "gelu": products, "bmm": bare},
        rounds=device.choose(cuda=10, cpu=2),
        calls=device.choose(cuda=5, cpu=1),
    )
    flops = 3.0 * 4 * e * R * D * hidden
    return {
        "experts": e,
        "rows": R,
        "layer_tflops": flops / seconds["layer"] / 1e12,
        "bmm_tflops": flops / seconds["bmm"] / 1e12,
        "bmm / layer": seconds["bmm"] / seconds["layer"],
        "bmm and gelu / layer": seconds["gelu"] / seconds["layer"],
    }


def blocks(device: Device, found: Findings) -> None:
    """MFU of a dense and of a sparse block, eager and compiled as training compiles them."""
    for preset in presets(device):
        peak = preset.config().cluster.peak_flops
        for name, words in BLOCKS.items():
            with found.part(f"{preset.name}, {name}"), fake_world(preset.world):
                config = with_words(preset, (*TWO_BLOCKS, *EAGER, *words))
                made = part(config, device, world=preset.world)
                for kind, work in works(made, device).items():
                    flops = block_flops(made, sparse=kind == "sparse")
                    seconds = device.seconds(
                        {kind: work}, rounds=device.choose(cuda=10, cpu=1), calls=device.choose(cuda=5, cpu=1)
                    )[kind]
                    found.values[f"{preset.name}, {kind}, {name}"] = {
                        "ms": 1e3 * seconds,
                        "tflops": flops / seconds / 1e12,
                        "mfu": flops / seconds / peak,
                    }


def works(made: Part, device: Device) -> dict[str, Callable[[], None]]:
    """One forward and backward of each block."""
    c, x = made.config, tokens(made.config, device)
    B, D, Y = c.train.microbatch, c.model.width, c.model.text_width

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device.kind, dtype=x.dtype)

    L = c.encoders.text.max_tokens
    condition = Conditioning(
        text_BLY=random(B, L, Y),
        text_mask_BL=torch.arange(L, device=device.kind)[None]
        < L // 2 + torch.arange(B, device=device.kind)[:, None] % (L // 2),
        vector_BD=random(B, D),
        timestep_BD=random(B, D),
        shared_B6D=random(B, 6 * D) if c.model.modulation == "shared" else None,
    )
    grad = torch.randn_like(x)

    def work(kind: str) -> Callable[[], None]:
        block = made.blocks[kind]

        def once() -> None:
            block.zero_grad(set_to_none=True)
            x.grad = None
            block(x, condition, group_tokens=c.group_tokens)[0].backward(grad)

        return once

    return {kind: work(kind) for kind in made.blocks}


def block_flops(made: Part, *, sparse: bool) -> float:
    """Forward and backward of one block on this rank, as the plan counts them."""
    c = made.config
    parts, share = (
        per_step(c, checkpointing="none").by_part,
        c.train.microbatch / c.train.global_batch / made.mesh.tp_size,
    )
    own = {"experts", "shared_experts", "router"} if sparse else {"dense_feed_forward"}
    sparse_blocks = len(c.sparse_layers)
    count = sparse_blocks if sparse else c.model.layers - sparse_blocks
    both = sum(parts[name] for name in ("self_attention", "cross_attention")) / c.model.layers
    return share * (both + sum(parts[name] for name in own) / count)
