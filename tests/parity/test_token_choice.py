"""Token choice equals GShard's top-k written as plain loops: gates, queue order, drops,
balance loss, every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moe_configs import moe_config, randomised
from torch import Tensor

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import experts_per_token
from ecdit_train.model.moe import MoE

POOLS, TOKENS, WIDTH = 3, 24, 10


def layer(*, experts: int, top_k: int, capacity_factor: float) -> MoE:
    config = moe_config("token_choice", num_experts=experts, capacity_factor=capacity_factor, top_k=top_k)
    router = config.router.build(RouterSizes(width=WIDTH, num_experts=experts, patch_values=1))
    made = MoE(
        router, config.experts.build(width=WIDTH, hidden=16, num_experts=experts), dispatcher=config.dispatcher.build()
    )
    return randomised(made)


def reference(
    x_GSD: Tensor, w_r: Tensor, up: Tensor, down: Tensor, *, top_k: int, capacity: int
) -> tuple[Tensor, Tensor, int]:
    """GShard, token by token. Returns the output, the balance loss without its weight and the number of drops."""
    experts, outputs, losses, dropped = w_r.shape[1], [], [], 0
    for x in x_GSD:
        p = (x @ w_r).softmax(-1)
        choices = [sorted(range(experts), key=lambda e, s=s: -p[s, e].item())[:top_k] for s in range(len(x))]
        queue = [0] * experts
        out = [torch.zeros_like(x[0]) for _ in range(len(x))]
        for k in range(top_k):  # all first choices before all second ones
            for s in range(len(x)):
                e = choices[s][k]
                queue[e] += 1
                if queue[e] > capacity:
                    dropped += 1
                    continue
                gate = p[s, e] / (sum(p[s, other] for other in choices[s]) + 1e-9)
                out[s] = out[s] + gate * (F.gelu(x[s] @ up[e], approximate="tanh") @ down[e])
        outputs.append(torch.stack(out))
        share = [sum(c[0] == e for c in choices) / len(x) for e in range(experts)]
        losses.append(experts * sum(f * p[:, e].mean() for e, f in enumerate(share)))
    return torch.stack(outputs), torch.stack(losses).mean(), dropped


@pytest.mark.parametrize(
    ("experts", "top_k", "capacity_factor"),
    [(4, 2, 2.0), (4, 2, 1.0), (8, 2, 2.0), (8, 1, 1.0), (8, 3, 2.0), (4, 2, 4.0)],
)
def test_values_gradients_drops_and_balance(experts, top_k, capacity_factor):
    ours = layer(experts=experts, top_k=top_k, capacity_factor=capacity_factor)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(POOLS, TOKENS, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y, a = ours(x, group_tokens=TOKENS)
    ((y * weight).sum() + 100 * a.losses["balance"]).backward()

    leaves = [z.detach().clone().requires_grad_() for z in (x, ours.router.weight, ours.experts.up, ours.experts.down)]
    y_ref, balance, dropped = reference(*leaves, top_k=top_k, capacity=int(TOKENS * capacity_factor / experts))
    ((y_ref * weight).sum() + 100 * 0.01 * balance).backward()

    torch.testing.assert_close(y, y_ref, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(a.losses["balance"], 0.01 * balance)
    for mine, leaf in zip((x, ours.router.weight, ours.experts.up, ours.experts.down), leaves, strict=True):
        torch.testing.assert_close(mine.grad, leaf.grad, rtol=1e-9, atol=1e-10)
    assert POOLS * TOKENS * top_k - int(a.filled_EGC.sum()) == dropped
    assert int(experts_per_token(a).sum()) == POOLS * TOKENS * top_k - dropped
    if capacity_factor < top_k:
        assert dropped > 0
    if capacity_factor == experts:
        assert dropped == 0


def test_empty_slots_stay_in_their_pool_and_have_no_weight():
    ours = layer(experts=8, top_k=1, capacity_factor=2.0)
    x = torch.randn(POOLS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, a = ours(x, group_tokens=TOKENS)
    assert not a.filled_EGC.all()
    assert (a.gate_EGC[~a.filled_EGC] == 0).all()
    assert (a.gate_EGC[a.filled_EGC] > 0).all()
    assert torch.equal(a.index_EGC // TOKENS, torch.arange(POOLS)[None, :, None].expand_as(a.index_EGC))


def test_other_pools_have_no_influence():
    ours = layer(experts=4, top_k=2, capacity_factor=1.0)
    x = torch.randn(POOLS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    other = x.clone()
    other[1] += 1.0
    a, b = ours(x, group_tokens=TOKENS)[0], ours(other, group_tokens=TOKENS)[0]
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])


def test_all_tokens_to_one_expert():
    """The worst imbalance: everybody's first choice is one expert; it serves the first C and the rest are counted."""
    ours = layer(experts=4, top_k=1, capacity_factor=1.0)
    with torch.no_grad():
        ours.router.weight.zero_()
        ours.router.weight[0, 2] = 5.0
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:, :, 0] = x[:, :, 0].abs() + 0.5
    _, a = ours(x, group_tokens=TOKENS)
    capacity = TOKENS // 4
    assert a.index_EGC[2, 0].tolist() == list(range(capacity))
    assert a.filled_EGC.sum(-1).flatten().tolist() == [0, 0, capacity, 0]
    assert TOKENS - int(a.filled_EGC.sum()) == TOKENS - capacity
