"""What the sparse layer is held against: the paper's Algorithm 1 taken literally, the bare products, and a dense layer.

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.dispatchers.deterministic import DeterministicDispatcher
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.experts.gelu import GeluExperts
from ecdit_train.model.feed_forward import FeedForward
from ecdit_train.model.moe import Form, MoE, plain
from ecdit_train.model.routers.expert_choice import ExpertChoice, ExpertChoiceRouter


class Algorithm1(nn.Module):
    """The paper's Algorithm 1, line by line: one-hot dispatch, a list of experts."""

    def __init__(self, width: int, *, hidden: int, experts: int, capacity: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, experts))
        self.experts = nn.ModuleList(FeedForward(width, hidden=hidden) for _ in range(experts))
        self.capacity = capacity

    def forward(self, x_GSD: Tensor) -> Tensor:
        affinity = torch.einsum("bsd,de->bse", x_GSD, self.weight).softmax(-1).transpose(1, 2)
        gating, index = affinity.topk(self.capacity, dim=-1)
        dispatch = F.one_hot(index, x_GSD.shape[1]).to(x_GSD.dtype)
        x_in = torch.einsum("becs,bsd->becd", dispatch, x_GSD)
        x_e = torch.stack([expert(x_in[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("becs,bec,becd->bsd", dispatch, gating, x_e)


def fill(module: nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * p.shape[-1] ** -0.5)


def fill_zeros(module: nn.Module, *, std: float) -> None:
    """Random values where first weights are zero, so that everything has an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * std)


def expert_choice(
    width: int, *, hidden: int, experts: int, capacity_factor: float, deterministic: bool = False, form: Form = plain
) -> MoE:
    config = ExpertChoice(capacity_factor=capacity_factor, sees="modulated")
    router = ExpertChoiceRouter(RouterSizes(width=width, num_experts=experts, patch_values=1), config=config)
    dispatcher = DeterministicDispatcher() if deterministic else IndexAddDispatcher()
    return MoE(router, GeluExperts(width, hidden=hidden, num_experts=experts), dispatcher=dispatcher, form=form)


def kept_rows(layer: MoE, x_GSD: Tensor, *, capacity_factor: float) -> float:
    """Vectors of width D that the layer holds for each of its rows (`capacity_factor` for a token) between forward and backward:
    what lies in storages other than the tokens' own and the weights'."""
    x_GSD = x_GSD.detach().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x_GSD, *layer.parameters())}
    sizes: dict[int, int] = {}
    held = []  # so that no storage is given back and counted twice

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        if t.untyped_storage().data_ptr() not in known:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x_GSD, group_tokens=x_GSD.shape[1])
    return sum(sizes.values()) / (capacity_factor * x_GSD.numel() * x_GSD.element_size())


def copy_weights(source: MoE, target: Algorithm1) -> None:
    with torch.no_grad():
        target.weight.copy_(source.router.weight)
        for expert, up, down in zip(target.experts, source.experts.up, source.experts.down, strict=True):
            expert.up.weight.copy_(up.T)
            expert.down.weight.copy_(down.T)


def check(*, experts: int, capacity_factor: int, group_tokens: int, deterministic: bool, form: Form = plain) -> None:
    """The layer is Algorithm 1 in fp64: values, and gradients of the tokens, the router and every expert. Experts,
    capacity and group are the benchmark's, the widths are small."""
    width, hidden = 32, 48
    source = expert_choice(
        width, hidden=hidden, experts=experts, capacity_factor=capacity_factor, deterministic=deterministic, form=form
    ).to(torch.float64)
    reference = Algorithm1(
        width, hidden=hidden, experts=experts, capacity=group_tokens * capacity_factor // experts
    ).to(torch.float64)
    fill(source, seed=0)
    copy_weights(source, reference)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, group_tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = source(a, group_tokens=group_tokens)[0], reference(b)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(e, name).weight.grad.T for e in reference.experts])

    for mine, other in (
        (ours, theirs),
        (a.grad, b.grad),
        (source.router.weight.grad, reference.weight.grad),
        (source.experts.up.grad, stacked("up")),
        (source.experts.down.grad, stacked("down")),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
