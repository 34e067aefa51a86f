"""Public peers' own sparse layers beside ours, unmodified, in one interleaved run.

    git clone https://github.com/SonyResearch/micro_diffusion peers/micro_diffusion
    git clone https://github.com/KwaiVGI/DiffMoE peers/DiffMoE
    git clone https://github.com/feizc/DiT-MoE peers/DiT-MoE
    make bench-peers PEERS=peers            # or: python -m benchmarks.peers peers [--rounds 8]

Folders that are not there are left out, and said; DeepSpeed's layer comes with its package. T = 2048 tokens of width 384, E = 16,
two experts to a token, groups of 1024 tokens, fp32, forward and backward, one thread. Time is held against a dense layer of equal
activated FLOPs: experts of another form (SwiGLU does half as many again) are divided by their own. The peers' packages are
imported from their folders; packages that they import besides are stood in for by empty names (UNUSED), since the layers do
not use it. No code of theirs is in this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecdit_train.model.dispatchers.deterministic import DeterministicDispatcher
from ecdit_train.model.feed_forward import FeedForward
from ecdit_train.model.lean import lean
from ecdit_train.model.moe import MoE

from .layers import Algorithm1, expert_choice, fill
from .moe_layer import CAPACITY_FACTOR, GROUP, HIDDEN, TOKENS, WIDTH
from .timing import Bar, Work, interleave, report, settle

EXPERTS = 16


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A layer of someone else's."""

    folder: str | None
    """Under the folder of peers; None: an installed package."""
    make: Callable[[Path], nn.Module]
    flops: float = 1.0
    """Of its experts' products, over ours."""


def micro_diffusion(folder: Path) -> nn.Module:
    (layers,) = _modules(folder / "micro_diffusion" / "models", "dit")
    layer = layers.FeedForwardECMoe(EXPERTS, float(CAPACITY_FACTOR), WIDTH, HIDDEN, 1)
    layer.custom_init(0.02)
    return layer


def diffmoe(folder: Path) -> nn.Module:
    layers, parts = _modules(folder / "models", "models_DiffMoE", "modules")
    return layers.SparseMoEBlock(_mlps(parts), WIDTH, EXPERTS, capacity=CAPACITY_FACTOR)


def diffmoe_ecdit(folder: Path) -> nn.Module:
    layers, parts = _modules(folder / "models", "models_ECDiT", "modules")
    return layers.SparseMoEBlock(_mlps(parts), WIDTH, EXPERTS, capacity=CAPACITY_FACTOR)


def dit_moe(folder: Path) -> nn.Module:
    (layers,) = _modules(folder, "models")
    layer = layers.SparseMoeBlock(WIDTH, HIDDEN // WIDTH, EXPERTS, CAPACITY_FACTOR)
    layer.shared_experts = layer.n_shared_experts = None
    return layer


def deepspeed(_: Path) -> nn.Module:
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    from ecdit_train.parallel.expert_parallel import _vendor

    _vendor()  # its own handle of torch.distributed, without the op that it would compile
    gate = TopKGate(WIDTH, EXPERTS, CAPACITY_FACTOR, 1.0, 1.0, min_capacity=0)
    layer = MOELayer(gate, Experts(FeedForward(WIDTH, hidden=HIDDEN), EXPERTS), "peers", 1, EXPERTS)
    layer._set_ep_group(dist.group.WORLD)
    return _EveryToken(layer)


class _EveryToken(nn.Module):
    """DeepSpeed's layer is told which tokens count."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None)


def _mlps(parts: Any) -> list[nn.Module]:
    return [parts.Mlp(WIDTH, HIDDEN, act_layer=lambda: nn.GELU(approximate="tanh")) for _ in range(EXPERTS)]


PEERS = {
    "micro_diffusion, expert choice": Peer(folder="micro_diffusion", make=micro_diffusion),
    "DiffMoE": Peer(folder="DiffMoE", make=diffmoe),
    "DiffMoE's EC-DiT": Peer(folder="DiffMoE", make=diffmoe_ecdit),
    "DiT-MoE, top 2": Peer(folder="DiT-MoE", make=dit_moe, flops=1.5),
    "DeepSpeed's MOELayer, top 2": Peer(folder=None, make=deepspeed),
}


class _Absent(ModuleType):
    """Names of a package that is not installed: none of them does anything."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


UNUSED = ("timm", "flash_attn", "torchmetrics", "open_clip", "transformers")
"""Packages that the peers import and their sparse layers do not use."""


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked first, so that none of them is really imported, whether it is installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _modules(folder: Path, *names: str) -> list[Any]:
    """Modules of a folder, as those of a package of their own: two peers have a `models`."""
    package = f"peer_{folder.parent.name}_{folder.name}".replace("-", "_")
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]  # type: ignore[attr-defined]
    stand_ins, before = _StandIns(), set(sys.modules)
    sys.meta_path.insert(0, stand_ins)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return [importlib.import_module(f"{package}.{name}") for name in names]
    finally:
        sys.meta_path.remove(stand_ins)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _Absent):
                del sys.modules[name]


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A group of this process alone: two of the peers ask for one."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def work(layer: nn.Module, x: Tensor, **kwargs: int) -> Work:
    """Forward and backward, on gradients made anew."""
    x = x.clone().requires_grad_()
    grad = torch.ones_like(x)

    def run() -> None:
        y = layer(x, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(grad.view_as(y))
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return run


def ours(x: Tensor) -> dict[str, Work]:
    layer = expert_choice(WIDTH, hidden=HIDDEN, experts=EXPERTS, capacity_factor=CAPACITY_FACTOR)
    literal = Algorithm1(WIDTH, hidden=HIDDEN, experts=EXPERTS, capacity=GROUP * CAPACITY_FACTOR // EXPERTS)
    dense = FeedForward(WIDTH, hidden=HIDDEN)
    for module in (layer, literal, dense):
        fill(module, seed=0)
    ordered = MoE(layer.router, layer.experts, dispatcher=DeterministicDispatcher())
    light = MoE(layer.router, layer.experts, dispatcher=layer.dispatcher, form=lean)
    return {
        "ecdit": work(layer, x, group_tokens=GROUP),
        "ecdit, ordered sums": work(ordered, x, group_tokens=GROUP),
        "ecdit, lean": work(light, x, group_tokens=GROUP),
        "Algorithm 1": work(literal, x),
        "dense": work(dense, torch.cat([x] * CAPACITY_FACTOR)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path, help="folder of the peers' repositories")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no round begins but the first three")
    asked = parser.parse_args(arguments)
    settle()
    x = torch.randn(TOKENS // GROUP, GROUP, WIDTH, generator=torch.Generator().manual_seed(9))
    works, left_out = ours(x), []
    with one_rank():
        for name, peer in PEERS.items():
            folder = asked.peers / (peer.folder or ".")
            if not folder.is_dir():
                left_out.append(name)
                print(f"left out: {name}: there is no {folder}")
                continue
            works[name] = work(peer.make(folder).train(), x)
        (times,) = interleave({"fp32": works}, rounds=asked.rounds, seconds=asked.seconds).values()
    flops = {name: peer.flops for name, peer in PEERS.items()}
    ratios = {n: round(times.ratio(n, "dense") / flops.get(n, 1.0), 3) for n in works if n != "dense"}
    width = max(map(len, ratios))
    for name, value in sorted(ratios.items(), key=lambda pair: pair[1]):
        print(f"{name:<{width}}  {value:6.3f} of a dense layer of equal activated FLOPs")
    best = min(value for name, value in ratios.items() if name.startswith("ecdit"))
    bars = [
        Bar(name=f"{name} / our best", value=round(ratios[name] / best, 3), limit=1.0, at_least=True)
        for name in PEERS
        if name in ratios
    ]
    settings = {"tokens": TOKENS, "width": WIDTH, "experts": EXPERTS, "group_tokens": GROUP, "rounds": times.rounds}
    return report("peers", settings=settings | {"left_out": left_out}, ratios={"fp32": ratios}, bars=bars)


if __name__ == "__main__":
    sys.exit(main())
