"""The expert-choice layer against the bare batched product, Algorithm 1 taken literally and a dense layer of equal FLOPs.

    python -m benchmarks.moe_layer [--rounds 5]

T = 2048 tokens of width 384, f_c = 2, routing groups of 1024 tokens, forward and backward, E = 8 .. 64, fp32 and bf16. Every
variant is first checked against Algorithm 1 in fp64. The bars hold on one CPU thread; no GPU number is claimed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from ecdit_train.model.dispatchers.deterministic import DeterministicDispatcher
from ecdit_train.model.feed_forward import FeedForward
from ecdit_train.model.moe import MoE

from .layers import Algorithm1, check, expert_choice, fill
from .timing import Bar, Times, Work, interleave, report, settle

TOKENS, WIDTH, HIDDEN, CAPACITY_FACTOR, GROUP = 2048, 384, 1536, 2, 1024
EXPERTS = (8, 16, 32, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def work(module: nn.Module, x: Tensor, *, group_tokens: int | None = None) -> Work:
    """One forward and backward; gradients of the input and of every parameter are made anew and given back."""
    x = x.requires_grad_()
    grad = torch.ones_like(x)

    def run() -> None:
        y = module(x) if group_tokens is None else module(x, group_tokens=group_tokens)[0]
        y.backward(grad)
        module.zero_grad(set_to_none=True)
        x.grad = None

    return run


def case(experts: int, dtype: torch.dtype) -> dict[str, Work]:
    """Variants at one E and type; those with stacked weights share them."""
    capacity = GROUP * CAPACITY_FACTOR // experts
    literal = Algorithm1(WIDTH, hidden=HIDDEN, experts=experts, capacity=capacity)
    layer = expert_choice(WIDTH, hidden=HIDDEN, experts=experts, capacity_factor=CAPACITY_FACTOR)
    dense = FeedForward(WIDTH, hidden=HIDDEN)
    for number, module in enumerate((literal, layer, dense)):
        fill(module.to(dtype), seed=number)
    deterministic = MoE(layer.router, layer.experts, dispatcher=DeterministicDispatcher())
    bare = layer.experts
    rows = CAPACITY_FACTOR * TOKENS
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    many = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    groups = x.view(-1, GROUP, WIDTH)
    return {
        "layer": work(layer, groups.clone(), group_tokens=GROUP),
        "deterministic": work(deterministic, groups.clone(), group_tokens=GROUP),
        "algorithm1": work(literal, groups.clone()),
        "bmm": work(bare, many.view(experts, -1, WIDTH).clone()),
        "dense": work(dense, many.clone()),
    }


def summarise(times: Times) -> dict[str, float]:
    pairs = {
        "layer / bmm": ("layer", "bmm"),
        "deterministic / bmm": ("deterministic", "bmm"),
        "deterministic / layer": ("deterministic", "layer"),
        "algorithm1 / layer": ("algorithm1", "layer"),
        "layer / dense": ("layer", "dense"),
        "bmm / dense": ("bmm", "dense"),
    }
    ratios = {name: round(times.ratio(*pair), 3) for name, pair in pairs.items()}
    ratios["layer / bmm spread"] = round(times.spread("layer", "bmm"), 3)
    return ratios


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    settle()
    for experts in EXPERTS:
        for deterministic in (False, True):
            check(experts=experts, capacity_factor=CAPACITY_FACTOR, group_tokens=GROUP, deterministic=deterministic)
    print("the layer equals Algorithm 1 in fp64 with both dispatchers: values and all gradients")
    cases = {f"E={e} {name}": case(e, dtype) for e in EXPERTS for name, dtype in DTYPES.items()}
    ratios = {name: summarise(times) for name, times in interleave(cases, rounds=rounds).items()}
    columns = list(next(iter(ratios.values())))
    print(f"{'':<12}" + "".join(f"{c:>24}" for c in columns))
    for name, row in ratios.items():
        print(f"{name:<12}" + "".join(f"{row[c]:>24.3f}" for c in columns))
    bars = []
    for name, row in ratios.items():
        bars.append(
            Bar(name=f"{name}: layer / bare batched product", value=row["layer / bmm"], limit=1.10, at_least=False)
        )
        bars.append(Bar(name=f"{name}: Algorithm 1 / layer", value=row["algorithm1 / layer"], limit=1.6, at_least=True))
        if name in ("E=8 bf16", "E=16 bf16", "E=8 fp32", "E=16 fp32"):
            bars.append(
                Bar(
                    name=f"{name}: layer / dense of equal FLOPs", value=row["layer / dense"], limit=1.20, at_least=False
                )
            )
    settings = {
        "tokens": TOKENS,
        "width": WIDTH,
        "hidden": HIDDEN,
        "capacity_factor": CAPACITY_FACTOR,
        "group_tokens": GROUP,
        "rounds": rounds,
        "pass": "forward + backward",
    }
    return report("moe_layer", settings=settings, ratios=ratios, bars=bars)


if __name__ == "__main__":
    sys.exit(main())
