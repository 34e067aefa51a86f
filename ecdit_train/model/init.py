"""First values of every parameter, as a pure function of (seed, name, global element): the same on every layout.

Matrices are Xavier-uniform; modulations, cross-attention's output, the output layer and biases start at zero
(AdaLN-Zero: every block is the identity at first; cross-attention has no gate, so its output projection takes that
part, as in PixArt-alpha); norms start at one. Built on the meta device, a rank fills only the box it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ecdit_train import keyed

from .moe import Experts
from .router import Router

_ZERO = ("modulation.weight", "cross_attention.out.weight", "final.weight")


def initial_values(
    name: str,
    *,
    seed: int,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    device: torch.device | str = "cpu",
    slot: tuple[Router | Experts | None, str] = (None, ""),
) -> Tensor:
    """fp32 values of the box `[offsets, offsets + sizes)` of parameter `name`; `slot` as `slot_of` says.

    In a router or experts the network's names mean nothing: what `constants` lists has that value, a name that ends in
    bias is 0, the rest is Xavier-uniform.
    """
    owner, inside = slot
    if owner is not None and inside in owner.constants:
        return torch.full(sizes, owner.constants[inside], device=device)
    if (owner is None and name.endswith(_ZERO)) or name.endswith("bias"):
        return torch.zeros(sizes, device=device)
    if owner is None and ".norm" in f".{name}" and name.endswith(".weight"):
        return torch.ones(sizes, device=device)
    u = keyed.uniform_box(seed, name, global_shape=global_shape, offsets=offsets, sizes=sizes, device=device)
    if name.endswith("text.null"):
        return (2.0 * u - 1.0) * 0.02 * math.sqrt(3.0)
    fan_in_plus_out = sum(global_shape[-2:])
    return (2.0 * u - 1.0) * math.sqrt(6.0 / fan_in_plus_out)


def slot_of(model: nn.Module, name: str) -> tuple[Router | Experts | None, str]:
    """The router or the experts that a parameter belongs to, and its name in there; (None, name) for the network's own."""
    parts = name.split(".")
    for n in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:n]))
        if isinstance(module, Router | Experts):
            return module, ".".join(parts[n:])
    return None, name


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are part of a run's state, by name."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def reset_buffers(model: nn.Module) -> None:
    """First values of all buffers, written by the modules that own them."""
    for path, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            if not hasattr(module, "reset_buffers"):
                raise TypeError(f"{path} ({type(module).__name__}) has buffers and must define reset_buffers()")
            module.reset_buffers()


def initialise(model: nn.Module, *, seed: int) -> None:
    """Fill every parameter and buffer of an unsharded model in place."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            shape = tuple(p.shape)
            where = {"global_shape": shape, "offsets": (0,) * len(shape), "sizes": shape}
            p.copy_(initial_values(name, seed=seed, device=p.device, slot=slot_of(model, name), **where))
        reset_buffers(model)
