"""First values of every parameter, as a pure function of (seed, name, global element): the same on every layout.

Matrices are Xavier-uniform; modulations, cross-attention's output, the output layer and biases start at zero
(AdaLN-Zero: every block is the identity at first; cross-attention has no gate, so its output projection takes that
part, as in PixArt-alpha); norms start at one. Built on the meta device, a rank fills only the box it holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ecdit_train import keyed

_ZERO = ("modulation.weight", "cross_attention.out.weight", "final.weight")


def initial_values(
    name: str,
    *,
    seed: int,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    device: torch.device | str = "cpu",
    constant: float | None = None,
) -> Tensor:
    """fp32 values of the box `[offsets, offsets + sizes)` of parameter `name`; all `constant` where one is given."""
    if constant is not None:
        return torch.full(sizes, constant, device=device)
    if name.endswith(_ZERO) or name.endswith(".bias"):
        return torch.zeros(sizes, device=device)
    if ".norm" in f".{name}" and name.endswith(".weight"):
        return torch.ones(sizes, device=device)
    u = keyed.uniform_box(seed, name, global_shape=global_shape, offsets=offsets, sizes=sizes, device=device)
    if name.endswith("text.null"):
        return (2.0 * u - 1.0) * 0.02 * math.sqrt(3.0)
    fan_in_plus_out = sum(global_shape[-2:])
    return (2.0 * u - 1.0) * math.sqrt(6.0 / fan_in_plus_out)


def constant_of(model: nn.Module, name: str) -> float | None:
    """The one value that a slot's module wants a parameter of its own to start at (`Router.constants`, `Experts.constants`)."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), "constants", {}).get(leaf)


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
            p.copy_(initial_values(name, seed=seed, device=p.device, constant=constant_of(model, name), **where))
        reset_buffers(model)
