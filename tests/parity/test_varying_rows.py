"""A varying number of rows per expert equals plain loops over tokens and experts: values and every gradient in fp64,
with all rows and with the rows of a static cap.

Legend: G groups, S tokens of a group, D width, H hidden width, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from moe_configs import moe_config, randomised
from torch import Tensor

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import Selection, experts_per_token
from ecdit_train.model.moe import MoE
from ecdit_train.model.router import RouterInput

GROUPS, TOKENS, WIDTH, EXPERTS = 3, 20, 10, 4
FACTOR = 1.5


def layer(*, combine: str, cap: float | None, bound: float) -> MoE:
    c = moe_config("threshold", num_experts=EXPERTS, capacity_factor=FACTOR, combine=combine, cap=cap)
    router = c.router.build(RouterSizes(width=WIDTH, num_experts=EXPERTS, patch_values=1))
    made = MoE(router, c.experts.build(width=WIDTH, hidden=16, num_experts=EXPERTS), dispatcher=c.dispatcher.build())
    randomised(made)
    with torch.no_grad():
        router.threshold.fill_(bound)
    return made


def reference(
    x_GSD: Tensor, w_r: Tensor, up: Tensor, down: Tensor, *, bound: float, cap: float | None
) -> tuple[Tensor, int, int]:
    """Token by token. Returns the output, the rows that passed the bound and those that the cap dropped."""
    room = math.inf if cap is None else max(math.ceil(cap * TOKENS * FACTOR / EXPERTS - 1e-9), 1)
    outputs, passed, dropped = [], 0, 0
    for x in x_GSD:
        p = (x @ w_r).softmax(-1)
        out = [torch.zeros_like(x[0]) for _ in range(TOKENS)]
        for e in range(EXPERTS):
            takers = sorted(
                (s for s in range(TOKENS) if p[s, e].item() > bound), key=lambda s, p=p, e=e: -p[s, e].item()
            )
            passed, dropped = passed + len(takers), dropped + max(0, len(takers) - room)
            for s in takers[: len(takers) if room == math.inf else int(room)]:
                out[s] = out[s] + p[s, e] * (F.gelu(x[s] @ up[e], approximate="tanh") @ down[e])
        outputs.append(torch.stack(out))
    return torch.stack(outputs), passed, dropped


@pytest.mark.parametrize("combine", ["index_add", "deterministic"])
@pytest.mark.parametrize(("cap", "bound"), [(None, 0.25), (None, 0.0), (0.5, 0.25), (1.0, 0.2), (9.0, 0.25)])
def test_values_and_all_gradients(combine, cap, bound):
    ours = layer(combine=combine, cap=cap, bound=bound)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(GROUPS, TOKENS, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y, a = ours(x, group_tokens=TOKENS)
    (y * weight).sum().backward()

    mine = (x, ours.router.weight, ours.experts.up, ours.experts.down)
    leaves = [z.detach().clone().requires_grad_() for z in mine]
    y_ref, passed, dropped = reference(*leaves, bound=bound, cap=cap)
    (y_ref * weight).sum().backward()
    torch.testing.assert_close(y, y_ref, rtol=1e-11, atol=1e-12)
    for one, leaf in zip(mine, leaves, strict=True):
        torch.testing.assert_close(one.grad, leaf.grad, rtol=1e-10, atol=1e-11)
    assert int(experts_per_token(a).sum()) == passed - dropped
    if cap is not None:
        assert [int(part) for part in a.shares["capped_frac"]] == [dropped, passed]
        assert (dropped > 0) == (cap <= 1.0), "the small caps must drop, the large one must not"


@pytest.mark.parametrize("cap", [None, 1.0])
def test_nobody_selected_is_no_output_and_no_gradient(cap):
    ours = layer(combine="index_add", cap=cap, bound=1.0)
    x = torch.randn(GROUPS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y, a = ours(x, group_tokens=TOKENS)
    y.sum().backward()
    assert not y.any()
    assert int(experts_per_token(a).sum()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in ours.experts.parameters())


def test_the_threshold_aims_at_the_wanted_rows():
    """In the long run the bound lets capacity_factor experts per token pass."""
    ours = layer(combine="index_add", cap=None, bound=0.9)
    x = torch.randn(1, 400, WIDTH, dtype=torch.float64)
    assert isinstance(ours.router(RouterInput.of(x)), Selection)
    for _ in range(200):
        ours.router.update_buffers(ours.router(RouterInput.of(x)).observed)
    rows = ours.router(RouterInput.of(x)).selected_GSE.sum().item()
    assert rows == pytest.approx(400 * FACTOR, abs=2)
