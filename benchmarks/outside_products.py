"""Bytes that a block moves outside of its matrix products and attention: `python -m benchmarks.outside_products`.

Every op of one forward and backward in bf16 is seen as it runs, with its real tensors (through Triton's interpreter
where it is a kernel, so this needs no GPU): what it reads and writes, in bytes per token and unit of width. Views cost
nothing; a gather reads the rows it takes, not the table they come from. Caches are left out: what is counted is what a
GPU must move if nothing of it stays on the chip. The numbers do not depend on the width, up to what is kept per token
or image. The table is in docs/explanation/performance.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit_train.config.slots import RouterSizes
from ecdit_train.kernels import adaln, gelu, language
from ecdit_train.model.attention import Attention
from ecdit_train.model.block import Block
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.dispatchers.triton import TritonDispatcher
from ecdit_train.model.embed import Conditioning
from ecdit_train.model.experts.gelu import GeluExperts
from ecdit_train.model.feed_forward import FeedForward
from ecdit_train.model.moe import MoE
from ecdit_train.model.routers.expert_choice import ExpertChoice

B, S, D, E, FC, TEXT = 2, 128, 256, 8, 2, 16
"""Images, tokens of each, width, experts, rows per token, text tokens."""
N, R = B * S, FC * B * S

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "linear")
FREE = {
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty",
    "aten::empty_strided",
}
TABLES = {"aten::index_select", "ecdit::gather_rows", "ecdit::gather_and_dot", "aten::gather"}
"""Their first argument is read where the index points: as much as the result."""


class Traffic(TorchDispatchMode):
    """Use as a context; `bytes` by op."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and name not in FREE and not name.partition("::")[2].startswith(PRODUCTS):
            given = [size(t) for t in tensors((args, kwargs or {}))]
            made = [size(t) for t in tensors(out)]
            if name in TABLES and given:
                given[0] = made[0]
            if name in ("aten::index_add_", "aten::index_add"):
                if name == "aten::index_add":
                    self.bytes["aten::clone"] += 2 * made[0]
                given[0] = made[0] = given[-1]  # of the target the rows that are added to, read and written
            if name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::fill_", "aten::zero_"):
                given = []
            self.bytes[name] += sum(given) + sum(made)
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(t: Tensor) -> int:
    """Bytes that are really there: broadcast dims count once."""
    return (
        t.element_size() * int(torch.tensor([n for n, s in zip(t.shape, t.stride(), strict=True) if s] or [1]).prod())
        if t.numel()
        else 0
    )


def moved(work: Callable[[], Tensor], *leaves: Tensor) -> float:
    """Bytes per token and unit of width, forward and backward, of the gradients of `leaves`. The gradient that
    comes in is there."""
    with torch.no_grad():
        grad = torch.ones_like(work())
    with Traffic() as seen:
        torch.autograd.grad(work(), leaves, grad)
    return sum(seen.bytes.values()) / N / D


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Piece:
    leaves: tuple[Tensor, ...]
    plain: Callable[[], Tensor]
    fused: Callable[[], Tensor] | None = None
    """None where it has no kernel of ours."""


def pieces() -> dict[str, Piece]:
    """What a block is made of, outside of its products."""
    x, y, tokens, h, rows_RD = random(B, S, D), random(B, S, D), random(N, D), random(R, 4 * D), random(R, D)
    shift, scale, gate_BD, gate_R = random(B, D), random(B, D), random(B, D), random(R, dtype=torch.float32)
    index = torch.stack([torch.randperm(N) for _ in range(FC)]).flatten()
    weight, bias, dense = random(D), random(D), random(N, 4 * D)
    plain, kernels = IndexAddDispatcher(), TritonDispatcher()
    return {
        "norm and modulation": Piece(
            leaves=(x, shift, scale),
            plain=lambda: adaln.norm_modulate_twin(x, shift_BD=shift, scale_BD=scale)[1],
            fused=lambda: adaln.modulated_norm(x, shift_BD=shift, scale_BD=scale),
        ),
        "gated residual": Piece(leaves=(x, gate_BD, y), plain=lambda: x + gate_BD[:, None] * y),
        "norm before the text": Piece(leaves=(x, weight, bias), plain=lambda: F.layer_norm(x, (D,), weight, bias)),
        "GELU of the dense layer": Piece(leaves=(dense,), plain=lambda: F.gelu(dense, approximate="tanh")),
        "gather": Piece(
            leaves=(tokens,), plain=lambda: plain.gather(tokens, index), fused=lambda: kernels.gather(tokens, index)
        ),
        "GELU of the experts": Piece(leaves=(h,), plain=lambda: F.gelu(h, approximate="tanh")),
        "gate and sum": Piece(
            leaves=(rows_RD, gate_R),
            plain=lambda: plain.weigh(rows_RD, gate_R, index, num_tokens=N),
            fused=lambda: kernels.weigh(rows_RD, gate_R, index, num_tokens=N),
        ),
    }


def lean_gelu() -> dict[str, float]:
    """What the backward of a lean layer makes of pre-activations, da and gates: g a, g dh and <a, da>; one pass against
    torch's own ops, in bf16."""
    h, da, gate = (torch.randn(R, n, dtype=torch.bfloat16) for n in (4 * D, 4 * D, 1))

    def plain() -> None:
        a = F.gelu(h, approximate="tanh")
        torch.ops.aten.gelu_backward(da, h, approximate="tanh") * gate
        (a * da).sum(-1, dtype=torch.float32)
        a * gate

    found = {}
    for name, work in {"plain": plain, "fused": lambda: gelu.gelu_backward_rows(h, da, gate[:, 0])}.items():
        with Traffic() as seen:
            work()
        found[name] = sum(seen.bytes.values()) / N / D
    return found


def block(*, sparse: bool, fused: bool) -> float:
    """A whole block, eager; `fused`: with the kernels that run on CUDA."""
    torch.manual_seed(0)
    attention = Attention(D, context_width=D, heads=D // 64, kv_heads=max(D // 128, 1), head_dim=64)
    cross = Attention(D, context_width=D, heads=D // 64, kv_heads=D // 64, head_dim=64)
    layer: FeedForward | MoE = FeedForward(D, hidden=4 * D)
    if sparse:
        router = ExpertChoice(capacity_factor=float(FC), sees="modulated").build(
            RouterSizes(width=D, num_experts=E, patch_values=4)
        )
        dispatcher = TritonDispatcher() if fused else IndexAddDispatcher()
        layer = MoE(router, GeluExperts(D, hidden=4 * D, num_experts=E), dispatcher=dispatcher)
    made = Block(D, self_attention=attention, cross_attention=cross, feed_forward=layer, modulations=3)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    made.to(torch.bfloat16)
    if isinstance(made.feed_forward, MoE):
        made.feed_forward.router.float()
    c = Conditioning(
        text_BLY=random(B, TEXT, D),
        text_mask_BL=torch.ones(B, TEXT, dtype=torch.bool),
        vector_BD=random(B, D),
        timestep_BD=random(B, D),
        shared_B6D=random(B, 6 * D),
    )
    x = random(B, S, D)
    types = language.TYPES
    try:
        if not fused:
            language.TYPES = frozenset()  # twins everywhere
        return moved(lambda: made(x, c, group_tokens=N)[0], x, *made.parameters())
    finally:
        language.TYPES = types


def table() -> list[tuple[str, float, float | None]]:
    found = []
    for name, piece in pieces().items():
        found.append((name, moved(piece.plain, *piece.leaves), piece.fused and moved(piece.fused, *piece.leaves)))
    lean = lean_gelu()
    found.append(("a, dh and the gates' gradient in a lean layer", lean["plain"], lean["fused"]))
    for name, sparse in {"dense block": False, "sparse block": True}.items():
        found.append((name, block(sparse=sparse, fused=False), block(sparse=sparse, fused=True)))
    return found


def main() -> int:
    if not language.HERE:
        print("needs Triton (pip install 'ecdit[kernels]')", file=sys.stderr)
        return 1
    if not language.INTERPRETED:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.outside_products"], env=os.environ | {"TRITON_INTERPRET": "1"}
        ).returncode
    print(f"bytes per token and unit of width, bf16, forward and backward, f_c = {FC}\n")
    print(f"| {'':44} | plain | fused |\n|{'-' * 46}|------:|------:|")
    for name, plain, fused in table():
        print(f"| {name:44} | {plain:5.1f} | {'' if fused is None else format(fused, '5.1f'):>5} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
