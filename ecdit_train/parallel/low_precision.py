"""8-bit products (`model.fp8`), applied from outside: to attention's projections, feed-forwards and experts of every block.

Not to routers (their products stay in fp32), embeddings, the text refiner, modulations and the output layer: small, or what
everything else depends on.

A scale is that of the whole tensor where tensor parallelism cuts it: ranks of a tp group agree on its largest magnitude (one
number a tensor). Data-parallel ranks, and parts of an expert's rows that are worked on by several ranks or one after another, have
a scale each, as microbatches have: since scales are powers of two, that moves only values that lie under the smallest normal number
of one of them. `delayed` remembers one number for all ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecdit_train.config.schema import Recipe, TrainConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.model import te_products
from ecdit_train.model.dit import DiT
from ecdit_train.model.experts.two_layers import TwoLayers
from ecdit_train.model.fp8 import Backend, Fp8Product

from .expert_parallel import sparse_layers
from .mesh import Mesh
from .tensor_parallel import split_of

CAPABILITY = (8, 9)
"""The least compute capability of a GPU with 8-bit tensor cores (Ada; Hopper is 9.0)."""
BLOCKS = ((10, 0), (12, 0))
"""From which on, and up to which, Transformer Engine multiplies with blocks (Blackwell of a data center)."""


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """How products in 8 bits are made."""

    recipe: Recipe
    backend: Backend

    @classmethod
    def of(cls, train: TrainConfig) -> Fp8 | None:
        return None if train.recipe is None else cls(recipe=train.recipe, backend=train.fp8_backend)


def check_device(train: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError where the device, or what is installed, cannot multiply what the run asks for."""
    if train.recipe is None or train.fp8_backend == "emulated":
        return

    def refused(rule: str, nearest: str, *, field: str = "fp8_backend") -> ConfigError:
        return ConfigError(Problem(field=f"train.{field}", value=getattr(train, field), rule=rule, nearest=nearest))

    by_torch = train.fp8_backend == "scaled_mm"
    if device.type != "cuda":
        why = "on a CPU torch works its 8-bit product out value by value, dozens of times as slowly"
        raise refused(f"needs a GPU: {why}" if by_torch else "needs a GPU: there is no other build of it", "emulated")
    found = torch.cuda.get_device_capability(device)
    has = f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
    if found < CAPABILITY:
        a, b = CAPABILITY
        raise refused(f"needs a GPU of compute capability {a}.{b} or more; {has}", "train.precision=bf16")
    missing = None if by_torch else te_products.missing()
    if missing is not None:
        raise refused(f"Transformer Engine {missing}", "emulated" if train.recipe == "mxfp8" else "scaled_mm")
    (a, b), (c, d) = BLOCKS
    if train.recipe == "mxfp8" and not (a, b) <= found < (c, d):
        rule = f"needs, in Transformer Engine, a GPU of compute capability {a}.{b} or more and below {c}.{d}; {has}"
        raise refused(rule, "current", field="fp8_recipe")


def apply_fp8(model: DiT, fp8: Fp8, *, mesh: Mesh) -> None:
    """In place, after tensor and before expert parallelism. Each layer gets a child named `fp8` that multiplies for it."""
    for path, layer in list(model.named_modules()):
        if split_of(path) is None or isinstance(layer, Fp8Product):
            continue
        product = Fp8Product(fp8.recipe, backend=fp8.backend).to(layer.weight.device)
        layer.add_module("fp8", product)
        if mesh.tp_size > 1:
            product.agree = functools.partial(_largest, group=mesh.tp_group)
            layer.product = product.linear  # type: ignore[assignment]
        else:
            assert isinstance(layer, nn.Linear)
            layer.forward = functools.partial(_linear, layer, product)  # type: ignore[method-assign]
    for moe in sparse_layers(model).values():
        experts = moe.experts
        assert isinstance(experts, TwoLayers), "a rule of the configuration"
        matrices = experts.matrices()
        made = [Fp8Product(fp8.recipe, stack=w.shape[0], backend=fp8.backend).to(w.device) for w in matrices]
        experts.add_module("fp8", nn.ModuleList(made))
        experts.products = tuple(made)


def place(model: DiT, *, mesh: Mesh) -> None:
    """Once experts are spread: which of all of them this rank holds, and how large its gradients are."""
    for module in model.modules():
        if isinstance(module, Fp8Product):
            module.unit = mesh.dp_size
    for moe in sparse_layers(model).values():
        for product in moe.experts.fp8:  # type: ignore[union-attr]
            product.first = mesh.ep_rank * (product.stack // mesh.ep_size)


def _linear(layer: nn.Linear, product: Fp8Product, x: Tensor) -> Tensor:
    return product.linear(x, layer.weight)  # asked each time: FSDP puts a gathered one in its place


def _largest(amax: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    whole = amax.clone()
    dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
    return whole
