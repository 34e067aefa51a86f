"""A whole training step against nothing but its matrix products and attention.

    python -m benchmarks.step [--rounds 8] [--seconds 90]

The step is a run's: draws, forward, backward, clipping, the guard, RMSProp and the moving average. One step is watched
op by op; then every product and every attention, forward and backward, is done again on tensors of the same shapes and
strides, in the same order, and nothing between them. The ratio says how much of a step is not arithmetic that has to
be. Twice: the demo's model, and one of 12 layers of width 384 with 16 experts and routing groups of 1024 tokens; the
latter in each form of its sparse layers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.parallel.runtime import alone

from .timing import Bar, Work, interleave, report, settle
from .training import Training, global_batch

MEDIUM = (
    *("experiment=shapes_tiny", "model.layers=12", "model.width=384", "model.heads=6", "model.kv_heads=2"),
    *("moe.num_experts=16", "moe.group_size=1024", "data.resolution=64", "train.microbatch=8", "train.global_batch=16"),
)
CASES = {
    "the demo": {"plain": ("experiment=shapes_tiny",), "lean": ("experiment=shapes_tiny", "moe.form=lean")},
    "12 layers of 384": {
        "plain": MEDIUM,
        "lean": (*MEDIUM, "moe.form=lean"),
    },
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
GOAL = 1.25


def step_of(config: RunConfig) -> Work:
    """One step of this run, on random latents and text."""
    training, micros = Training(config, alone(), lr=1e-6), global_batch(config)
    return lambda: training.step(micros).numbers() and None


class Recorded(TorchDispatchMode):
    """Remembers every product and attention with shapes and strides, and what the other ops were, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in PRODUCTS or "scaled_dot_product" in name:
            self.calls.append((func, *(tree_map(_as_shape, x) for x in (args, kwargs or {}))))
        else:
            self.others[name] += 1
        return func(*args, **(kwargs or {}))


def replay_of(step: Work) -> Work:
    """The products and attentions of a step, alone. Tensors of one shape share a few buffers, as an allocator would have it."""
    with Recorded() as seen:
        step()
    pool = _Pool()
    calls = [(func, tree_map(pool.tensor, args), tree_map(pool.tensor, kwargs)) for func, args, kwargs in seen.calls]

    @torch.no_grad()
    def run() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return run


class _Shape:
    def __init__(self, tensor: Tensor) -> None:
        self.key = (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _as_shape(x: Any) -> Any:
    return _Shape(x) if isinstance(x, Tensor) else x


class _Pool:
    def __init__(self) -> None:
        self._made: dict[Any, Iterator[Tensor]] = {}

    def tensor(self, x: Any) -> Any:
        if not isinstance(x, _Shape):
            return x
        if x.key not in self._made:
            self._made[x.key] = _in_turn([_made(*x.key) for _ in range(4)])
        return next(self._made[x.key])


def _in_turn(tensors: list[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from tensors


def _made(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    made = torch.empty_strided(shape, stride, dtype=dtype)
    return made.copy_(torch.randn(shape) * 0.1) if dtype.is_floating_point else made.zero_()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90.0, help="after which no round begins but the first three")
    parser.add_argument("--only", choices=CASES)
    asked = parser.parse_args(arguments)
    settle()
    cases: dict[str, dict[str, Work]] = {}
    for case, forms in CASES.items():
        if asked.only in (None, case):
            steps = {form: step_of(compose(list(words))) for form, words in forms.items()}
            cases[case] = {**steps, "products": replay_of(steps["plain"])}
    ratios: dict[str, dict[str, float]] = {}
    bars = []
    for case, times in interleave(cases, rounds=asked.rounds, seconds=asked.seconds).items():
        forms = [form for form in times.seconds if form != "products"]
        ratios[case] = {f"{form} / products": round(times.ratio(form, "products"), 3) for form in forms}
        ratios[case]["rounds"] = times.rounds
        print(f"{case}: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios[case].items()))
        best = min(forms, key=lambda form: ratios[case][f"{form} / products"])
        value = ratios[case][f"{best} / products"]
        bars.append(Bar(name=f"{case}: step ({best}) / its products", value=value, limit=GOAL, at_least=False))
    settings = {"dtype": "fp32", "optimizer": "rmsprop", "cases": {case: list(forms) for case, forms in CASES.items()}}
    return report("step", settings=settings, ratios=ratios, bars=bars)


if __name__ == "__main__":
    sys.exit(main())
