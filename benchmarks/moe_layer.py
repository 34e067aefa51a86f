"""The expert-choice layer, in each of its forms, against the bare batched product, Algorithm 1 taken literally and a
dense layer of equal FLOPs.

    python -m benchmarks.moe_layer [--rounds 12] [--seconds 150] [--experts 8,16,32,64]

T = 2048 tokens of width 384, f_c = 2, routing groups of 1024 tokens, forward and backward, fp32 and, where the CPU has
instructions for it, bf16. Every form is first checked against Algorithm 1 in fp64. `kept` counts the vectors of width d that a
layer holds for each row between forward and backward. The bars hold on one CPU thread; no GPU number is claimed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from ecdit_train.model.dispatchers.deterministic import DeterministicDispatcher
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.experts.two_layers import TwoLayers
from ecdit_train.model.feed_forward import FeedForward
from ecdit_train.model.lean import lean
from ecdit_train.model.moe import Dispatcher, Experts, Form, MoE, plain
from ecdit_train.parallel.compiling import compile_activations

from .layers import Algorithm1, check, expert_choice, fill, kept_rows
from .timing import Bar, Times, Work, fast_in_bf16, interleave, report, settle

TOKENS, WIDTH, HIDDEN, CAPACITY_FACTOR, GROUP = 2048, 384, 1536, 2, 1024
EXPERTS = (16,)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32} if fast_in_bf16() else {"fp32": torch.float32}
FORMS: dict[str, tuple[Form, Callable[[], Dispatcher]]] = {
    "plain": (plain, IndexAddDispatcher),
    "plain, ordered": (plain, DeterministicDispatcher),
    "plain, compiled": (plain, IndexAddDispatcher),
    "lean": (lean, IndexAddDispatcher),
    "lean, ordered": (lean, DeterministicDispatcher),
    "lean, compiled": (lean, IndexAddDispatcher),
}
"""Form of the layer, and how rows are summed; compiled is what `parallel.compile` compiles of it: the experts, or in the lean form
what is between their products."""


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
    bare = layer.experts
    rows = CAPACITY_FACTOR * TOKENS
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    many = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    groups = x.view(-1, GROUP, WIDTH)
    forms = {
        name: MoE(layer.router, experts_of(layer, name), dispatcher=dispatcher(), form=form)
        for name, (form, dispatcher) in FORMS.items()
    }
    return {
        **{name: work(form, groups.clone(), group_tokens=GROUP) for name, form in forms.items()},
        "algorithm1": work(literal, groups.clone()),
        "bmm": work(bare, many.view(experts, -1, WIDTH).clone()),
        "dense": work(dense, many.clone()),
    }


def experts_of(layer: MoE, form: str) -> Experts:
    """The layer's own, or compiled on the same weights."""
    if "compiled" not in form:
        return layer.experts
    experts = copy.copy(layer.experts)
    assert isinstance(experts, TwoLayers)
    if FORMS[form][0] is plain:
        experts.compute = torch.compile(experts.compute)  # type: ignore[method-assign]
    else:
        compile_activations(experts)
    return experts


def kept(form: str, dtype: torch.dtype, *, experts: int) -> float:
    """Vectors of width d per row."""
    made, dispatcher = FORMS[form]
    layer = expert_choice(WIDTH, hidden=HIDDEN, experts=experts, capacity_factor=CAPACITY_FACTOR, form=made).to(dtype)
    layer.router.float()
    layer.dispatcher = dispatcher()
    fill(layer, seed=0)
    return kept_rows(layer, torch.randn(TOKENS // GROUP, GROUP, WIDTH).to(dtype), capacity_factor=CAPACITY_FACTOR)


def summarise(times: Times) -> dict[str, float]:
    pairs = {f"{form} / {other}": (form, other) for form, other in product(FORMS, ("bmm", "dense"))}
    pairs |= {f"algorithm1 / {form}": ("algorithm1", form) for form in FORMS} | {"bmm / dense": ("bmm", "dense")}
    pairs["plain, ordered / plain"] = ("plain, ordered", "plain")
    ratios = {name: round(times.ratio(*pair), 3) for name, pair in pairs.items()}
    return ratios | {"lean / bmm spread": round(times.spread("lean", "bmm"), 3), "rounds": times.rounds}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no round begins but the first three")
    parser.add_argument("--experts", default=",".join(map(str, EXPERTS)))
    asked = parser.parse_args(arguments)
    numbers = [int(n) for n in asked.experts.split(",")]
    settle()
    for experts, (form, dispatcher) in product(numbers, FORMS.values()):
        ordered = dispatcher is DeterministicDispatcher
        check(experts=experts, capacity_factor=CAPACITY_FACTOR, group_tokens=GROUP, deterministic=ordered, form=form)
    print(f"{', '.join(FORMS)}: each equals Algorithm 1 in fp64, values and all gradients")
    if len(DTYPES) == 1:
        print("left out: bf16, for which this CPU has no instructions")
    cases = {f"E={e} {name}": case(e, dtype) for e in numbers for name, dtype in DTYPES.items()}
    measured = interleave(cases, rounds=asked.rounds, seconds=asked.seconds)
    ratios: dict[str, dict[str, float]] = {name: summarise(times) for name, times in measured.items()}
    print(f"{'':<30}" + "".join(f"{name:>12}" for name in ratios))
    for row in next(iter(ratios.values())):
        print(f"{row:<30}" + "".join(f"{found[row]:>12.3f}" for found in ratios.values()))
    rows = {f"{form} {name}": round(kept(form, t, experts=16), 3) for form in FORMS for name, t in DTYPES.items()}
    print("kept: " + ", ".join(f"{name} {value:.2f}" for name, value in rows.items()))
    bars = []
    for name, row in ratios.items():
        for form in FORMS:
            bars.append(Bar(name=f"{name}: {form} / bmm", value=row[f"{form} / bmm"], limit=1.05, at_least=False))
        best = min(FORMS, key=lambda form: row[f"{form} / bmm"])
        if name.startswith("E=16"):
            bars.append(Bar(name=f"{name}: {best} / dense", value=row[f"{best} / dense"], limit=1.00, at_least=False))
        bars.append(
            Bar(name=f"{name}: Algorithm 1 / {best}", value=row[f"algorithm1 / {best}"], limit=1.7, at_least=True)
        )
    bars += [
        Bar(name=f"rows kept, {name}", value=value, limit=5.2, at_least=False)
        for name, value in rows.items()
        if name.startswith("lean")
    ]
    settings = {
        "tokens": TOKENS,
        "width": WIDTH,
        "hidden": HIDDEN,
        "capacity_factor": CAPACITY_FACTOR,
        "group_tokens": GROUP,
        "pass": "forward + backward",
    }
    return report("moe_layer", settings=settings, ratios=ratios | {"kept": rows}, bars=bars)


if __name__ == "__main__":
    sys.exit(main())
