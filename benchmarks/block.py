"""A whole sparse block against a dense block of equal activated FLOPs.

    python -m benchmarks.block [--rounds 7] [--seconds 40]

16 images of 128 tokens, width 384, 128 text tokens of width 1536, E = 16, routing groups of 1024 tokens, forward and backward.
The dense block's feed-forward works on twice the rows, as f_c = 2 does.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from ecdit_train.model.assignment import Assignment
from ecdit_train.model.attention import Attention
from ecdit_train.model.block import Block
from ecdit_train.model.embed import Conditioning
from ecdit_train.model.feed_forward import FeedForward
from ecdit_train.model.lean import lean
from ecdit_train.model.moe import MoE

from .layers import Algorithm1, expert_choice, fill
from .moe_layer import DTYPES
from .timing import Bar, Work, interleave, report, settle

IMAGES, TOKENS, WIDTH, TEXT_TOKENS, TEXT_WIDTH, EXPERTS, GROUP = 16, 128, 384, 128, 1536, 16, 1024
HEAD_DIM, KV_HEADS = 64, 2


class Twice(FeedForward):
    """A dense feed-forward that works on every token twice: the FLOPs that f_c = 2 activates."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        first, second = super().forward(torch.cat([x_BSD, x_BSD])).chunk(2)
        return first + second


class Literal(MoE):
    """Algorithm 1 where the block expects a sparse layer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = Algorithm1(WIDTH, hidden=4 * WIDTH, experts=EXPERTS, capacity=GROUP * 2 // EXPERTS)

    def forward(self, x_BSD: Tensor, *, group_tokens: int, **_: Tensor) -> tuple[Tensor, Assignment]:  # type: ignore[override]
        return self.layer(x_BSD.reshape(-1, group_tokens, WIDTH)).view_as(x_BSD), None  # type: ignore[return-value]


def make(feed_forward: FeedForward | MoE, dtype: torch.dtype) -> Block:
    heads = WIDTH // HEAD_DIM
    block = Block(
        WIDTH,
        self_attention=Attention(WIDTH, context_width=WIDTH, heads=heads, kv_heads=KV_HEADS, head_dim=HEAD_DIM),
        cross_attention=Attention(WIDTH, context_width=TEXT_WIDTH, heads=heads, kv_heads=heads, head_dim=HEAD_DIM),
        feed_forward=feed_forward,
        modulations=3,
    ).to(dtype)
    fill(block, seed=0)
    return block


def work(block: Block, dtype: torch.dtype) -> Work:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, text = random(IMAGES, TOKENS, WIDTH), random(IMAGES, TEXT_TOKENS, TEXT_WIDTH)
    vector, shared = random(IMAGES, WIDTH), random(IMAGES, 6, WIDTH)
    mask = torch.ones(IMAGES, TEXT_TOKENS, dtype=torch.bool)
    grad = torch.ones_like(x)

    def run() -> None:
        block.zero_grad(set_to_none=True)
        for z in (x, text, vector, shared):
            z.grad = None
        c = Conditioning(
            text_BLY=text, text_mask_BL=mask, vector_BD=vector, timestep_BD=vector.detach(), shared_B6D=shared
        )
        block(x, c, group_tokens=GROUP)[0].backward(grad)

    return run


def case(dtype: torch.dtype) -> dict[str, Work]:
    hidden = 4 * WIDTH
    blocks: dict[str, FeedForward | MoE] = {
        "expert choice": expert_choice(WIDTH, hidden=hidden, experts=EXPERTS, capacity_factor=2),
        "lean": expert_choice(WIDTH, hidden=hidden, experts=EXPERTS, capacity_factor=2, form=lean),
        "algorithm1": Literal(),
        "dense x2": Twice(WIDTH, hidden=hidden),
        "dense": FeedForward(WIDTH, hidden=hidden),
    }
    return {name: work(make(feed_forward, dtype), dtype) for name, feed_forward in blocks.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=40.0, help="after which no round begins but the first three")
    asked = parser.parse_args(arguments)
    rounds, seconds = asked.rounds, asked.seconds
    settle()
    ratios, bars = {}, []
    for name, times in interleave(
        {name: case(dtype) for name, dtype in DTYPES.items()}, rounds=rounds, seconds=seconds
    ).items():
        row = {
            f"{v} / dense x2": round(times.ratio(v, "dense x2"), 3)
            for v in ("expert choice", "lean", "algorithm1", "dense")
        }
        row["expert choice / algorithm1"] = round(times.ratio("expert choice", "algorithm1"), 3)
        ratios[name] = row
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
        bars.append(
            Bar(
                name=f"{name}: sparse block / dense block of equal FLOPs",
                value=row["expert choice / dense x2"],
                limit=1.12,
                at_least=False,
            )
        )
    settings = {
        "images": IMAGES,
        "tokens": TOKENS,
        "width": WIDTH,
        "text": [TEXT_TOKENS, TEXT_WIDTH],
        "experts": EXPERTS,
        "group_tokens": GROUP,
        "rounds": rounds,
        "pass": "forward + backward",
    }
    return report("block", settings=settings, ratios=ratios, bars=bars)


if __name__ == "__main__":
    sys.exit(main())
