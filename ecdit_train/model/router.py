"""What a router is. Implementations are in `routers/`, one file each with its configuration; how to add one: CONTRIBUTING.md.

Legend: B images, G routing groups, S tokens of a group, D hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ecdit_train.config.schedule import ScheduledCapacity
from ecdit_train.config.slots import RouterSizes, Sees

from .assignment import Assignment


@dataclass(frozen=True, kw_only=True)
class RouterInput:
    """The tokens of whole groups, as a router may look at them. Groups hold consecutive tokens, images follow each other."""

    x_GSD: Tensor
    """What the experts work on: normalised, then modulated by timestep and text."""
    normed_GSD: Tensor
    """Normalised, not modulated."""
    hidden_GSD: Tensor
    """The residual stream itself: x' of the paper (eq. 4)."""
    timestep_BD: Tensor
    """Embedding of each image's timestep, without the text."""
    image_tokens: int
    """Tokens of an image: G * S = B * image_tokens."""

    @classmethod
    def of(cls, x_GSD: Tensor, *, image_tokens: int | None = None) -> RouterInput:
        """One tensor for every view of the tokens and timesteps of zero: a router on its own, in tests and benchmarks.
        `image_tokens`: S where it is not said."""
        G, S, D = x_GSD.shape
        image_tokens = image_tokens or S
        timestep = x_GSD.new_zeros(G * S // image_tokens, D)
        return cls(x_GSD=x_GSD, normed_GSD=x_GSD, hidden_GSD=x_GSD, timestep_BD=timestep, image_tokens=image_tokens)


register_dataclass(RouterInput)  # so that FSDP and checkpointing see the tensors inside


class Router(nn.Module):
    """Says which tokens each expert of a sparse layer works on.

    Parameters and buffers are made on the meta device and get their values afterwards: parameters are
    Xavier-uniform unless named in `constants`, buffers are written by `reset_buffers`. Both are saved, restored and
    placed on any layout. A router's parameters stay in fp32 whatever the compute precision is: a rounded logit
    changes who takes which token.
    """

    constants: ClassVar[Mapping[str, float]] = {}
    """Parameters that start at one value, by their names in the router."""

    def forward(self, tokens: RouterInput) -> Assignment:
        """Returns a `Table` where the number of rows is fixed, else a `Selection`; which of the two may differ between
        training and inference (`self.training`).

        May be run twice for one step, so it writes nothing: what buffers need goes into `Assignment.observed`.
        """
        raise NotImplementedError

    def at_step(self, step: int) -> None:
        """Before every update and before drawing: `step` updates were made. For what changes by stages (`RouterConfig.stages`)."""

    def reset_buffers(self) -> None:
        """Write the first values of all buffers, in place."""
        if any(True for _ in self.buffers(recurse=False)):
            raise NotImplementedError(f"{type(self).__name__} has buffers and must define reset_buffers()")

    def update_buffers(self, observed: Mapping[str, Tensor]) -> None:
        """Once after every optimizer step: `Assignment.observed`, averaged over the step; the same numbers on all ranks."""

    def on_ranks(self, *, dp_group: dist.ProcessGroup | None) -> None:
        """Called once when the model is spread: a router that selects over the whole global batch keeps the
        group of the data-parallel ranks, whose tokens follow each other in rank order. None: this process
        sees the whole batch."""


class AffinityRouter(Router):
    """Affinity of tokens and experts, softmax over experts: A = softmax(x W_r) (paper eq. 5).

    `sees`: `modulated` is what the experts see; `hidden` is x'; `timestep` is [t ; x]: the unmodulated token with its timestep
    beside it, so that the scale of a modulation cannot decide who takes which token (Nucleus-Image, arXiv 2604.12163).
    `mixes`: a layer x <- GELU(x W) of the tokens' width comes first (Expert Race).
    """

    def __init__(self, sizes: RouterSizes, *, sees: Sees, mixes: bool = False) -> None:
        super().__init__()
        self.sees = sees
        self.weight = nn.Parameter(torch.empty(sizes.width, sizes.num_experts))
        self.timestep_weight = nn.Parameter(torch.empty(sizes.width, sizes.num_experts)) if sees == "timestep" else None
        self.mix = nn.Parameter(torch.empty(sizes.width, sizes.width)) if mixes else None

    def seen(self, tokens: RouterInput) -> Tensor:
        """(G, S, D) fp32: what the product with `weight` is taken of."""
        x = self._looks_at(tokens)
        if self.mix is not None:
            return F.gelu(product_fp32(x, self.mix), approximate="tanh")
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def logits(self, tokens: RouterInput, *, seen_GSD: Tensor | None = None) -> Tensor:
        """(G, S, E) fp32. `seen_GSD`: what `seen` returned, where it is needed for more."""
        if seen_GSD is None:
            seen_GSD = self._looks_at(tokens) if self.mix is None else self.seen(tokens)
        logits = product_fp32(seen_GSD, self.weight)
        if self.timestep_weight is None:
            return logits
        # One product per image, not per token: [t ; x] W = t W_t + x W_x.
        by_image_BE = product_fp32(tokens.timestep_BD, self.timestep_weight)
        return (logits.view(-1, tokens.image_tokens, logits.shape[-1]) + by_image_BE[:, None]).view_as(logits)

    def _looks_at(self, tokens: RouterInput) -> Tensor:
        return {"modulated": tokens.x_GSD, "hidden": tokens.hidden_GSD, "timestep": tokens.normed_GSD}[self.sees]

    def affinity(self, tokens: RouterInput) -> Tensor:
        """(G, S, E) fp32."""
        return self.logits(tokens).softmax(dim=-1)


def product_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x W in fp32 (fp64 for doubles), whatever type x has: (..., D), (D, E) -> (..., E). Only x itself is kept for backward, not
    its copy in fp32, which would be as large as a row for each of two experts."""
    return _ProductFp32.apply(x, weight)


class _ProductFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(wide) @ weight.to(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = (grad @ weight.to(grad.dtype).t()).to(x.dtype)
            dweight = x.flatten(0, -2).to(grad.dtype).t() @ grad.flatten(0, -2)
        return dx, dweight.to(weight.dtype)


class ScheduledRouter(AffinityRouter):
    """An `AffinityRouter` whose experts take C tokens of a group, with the capacity factor of the stage that it was told last."""

    def __init__(self, sizes: RouterSizes, *, config: ScheduledCapacity) -> None:
        super().__init__(sizes, sees=config.sees)
        self.config = config
        self.stage = config.at(0)

    def at_step(self, step: int) -> None:
        self.stage = self.config.at(step)

    def capacity(self, tokens: int) -> int:
        """C in a group of so many tokens."""
        return whole_capacity(self.stage.capacity(group_tokens=tokens, num_experts=self.weight.shape[1]), tokens=tokens)


def whole_capacity(exact: float, *, tokens: int) -> int:
    """C as a Python int, at most all tokens of a group; the configuration's rules have checked that it is whole."""
    capacity = round(exact)
    assert capacity >= 1, f"capacity {exact} is below one token"
    assert abs(exact - capacity) < 1e-6, f"capacity {exact} is not whole"
    return min(capacity, tokens)
