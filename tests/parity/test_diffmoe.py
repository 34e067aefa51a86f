"""DiffMoE's router equals plain loops in fp64: training (values, both losses, every gradient, the observed thresholds) and
inference (who is taken, by how many).

Legend: G groups, S tokens of a group, D width, H hidden width, E experts, C capacity.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from moe_configs import moe_config, randomised
from torch import Tensor

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import Selection, Table, experts_per_token
from ecdit_train.model.moe import MoE
from ecdit_train.model.router import RouterInput
from ecdit_train.model.routers.diffmoe import DiffMoE

GROUPS, TOKENS, WIDTH, EXPERTS, FACTOR, WEIGHT, MOMENTUM = 2, 20, 10, 5, 1.5, 0.3, 0.9
C = 6


def layer(*, combine: str = "index_add", thresholds: float = 0.4) -> MoE:
    config = DiffMoE(capacity_factor=FACTOR, predictor_weight=WEIGHT, momentum=MOMENTUM, sees="modulated")
    c = moe_config(combine=combine)
    made = MoE(
        config.build(RouterSizes(width=WIDTH, num_experts=EXPERTS, patch_values=1)),
        c.experts.build(width=WIDTH, hidden=16, num_experts=EXPERTS),
        dispatcher=c.dispatcher.build(),
    )
    randomised(made)
    with torch.no_grad():
        made.router.threshold.copy_(thresholds + 0.05 * torch.arange(EXPERTS))
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(GROUPS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def asked(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Logit of each expert for one token."""
    h = x @ w["router.predictor_in.weight"].T + w["router.predictor_in.bias"]
    return (h * h.sigmoid()) @ w["router.predictor_out.weight"].T + w["router.predictor_out.bias"]


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda s: -values[s])[:count]


def combined(x_SD: Tensor, a_SE: Tensor, takers: list[list[int]], w: dict[str, Tensor]) -> Tensor:
    """`takers`: the tokens of each expert."""
    rows = [torch.zeros_like(x_SD[0]) for _ in range(TOKENS)]
    for e, mine in enumerate(takers):
        for s in mine:
            y = F.gelu(x_SD[s] @ w["experts.up"][e], approximate="tanh") @ w["experts.down"][e]
            rows[s] = rows[s] + a_SE[s, e] * y
    return torch.stack(rows)


@pytest.mark.parametrize("combine", ["index_add", "deterministic", "triton"])
def test_training(combine):
    ours, x = layer(combine=combine), tokens().requires_grad_()
    weight = tokens(seed=2)
    y, a = ours(x, group_tokens=TOKENS)
    assert isinstance(a, Table)
    assert a.losses.keys() == {"predictor"}
    ((y * weight).sum() + a.losses["predictor"]).backward()

    w = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}
    leaf = tokens().requires_grad_()
    outputs, terms, kth, right, passed = [], [], [], [], 0
    for x_SD in leaf:
        a_SE = (x_SD @ w["router.weight"]).softmax(-1)
        takers = [best(a_SE[:, e].tolist(), C) for e in range(EXPERTS)]
        outputs.append(combined(x_SD, a_SE, takers, w))
        p_SE = torch.stack([asked(token.detach(), w) for token in x_SD]).sigmoid()
        for e in range(EXPERTS):
            kth.append(sorted(p_SE[:, e].tolist(), reverse=True)[C - 1])
            for s in range(TOKENS):
                truth, p = s in takers[e], p_SE[s, e]
                terms.append(-torch.log(p if truth else 1 - p))
                right.append((p.item() > 0.5) == truth)
                passed += p.item() > ours.router.threshold[e].item()
    loss = WEIGHT * torch.stack(terms).mean()
    y_ref = torch.stack(outputs)
    ((y_ref * weight).sum() + loss).backward()

    torch.testing.assert_close(y, y_ref, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(a.losses["predictor"], loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-10, atol=1e-11)
    for name, p in ours.named_parameters():
        assert p.grad.any(), name
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-10, atol=1e-11, msg=name)
    expected = torch.tensor(kth, dtype=torch.float64).view(GROUPS, EXPERTS).mean(0)
    torch.testing.assert_close(a.observed["threshold"], expected)
    assert float(a.metrics["predictor_accuracy"]) == pytest.approx(sum(right) / len(right))
    assert float(a.metrics["predicted_experts_per_token"]) == pytest.approx(passed / (GROUPS * TOKENS))

    old = ours.router.threshold.clone()
    ours.router.update_buffers(a.observed)
    torch.testing.assert_close(ours.router.threshold, MOMENTUM * old + (1 - MOMENTUM) * expected)


def test_the_predictor_gives_the_trunk_no_gradient():
    ours, x = layer(), tokens().requires_grad_()
    ours(x, group_tokens=TOKENS)[1].losses["predictor"].backward()
    assert x.grad is None
    reached = {n for n, p in ours.named_parameters() if p.grad is not None}
    assert reached == {f"router.predictor_{end}.{kind}" for end in ("in", "out") for kind in ("weight", "bias")}


@pytest.mark.parametrize("thresholds", [0.4, -0.3, 1.0])
def test_inference(thresholds):
    """As many as are predicted, those of highest affinity; all of them below every prediction, none above."""
    ours, x = layer(thresholds=thresholds).eval(), tokens()
    y, a = ours(x, group_tokens=TOKENS)
    assert isinstance(ours.router(RouterInput.of(x)), Selection)
    w = dict(ours.named_parameters())
    outputs, counts, differs = [], [], False
    for x_SD in x:
        a_SE = (x_SD @ w["router.weight"]).softmax(-1)
        p_SE = torch.stack([asked(token, w) for token in x_SD]).sigmoid()
        above = [[s for s in range(TOKENS) if p_SE[s, e] > ours.router.threshold[e]] for e in range(EXPERTS)]
        takers = [best(a_SE[:, e].tolist(), len(above[e])) for e in range(EXPERTS)]
        differs |= any(set(one) != set(other) for one, other in zip(above, takers, strict=True))
        outputs.append(combined(x_SD, a_SE, takers, w))
        counts.append([sum(s in mine for mine in takers) for s in range(TOKENS)])
    torch.testing.assert_close(y, torch.stack(outputs), rtol=1e-11, atol=1e-12)
    assert experts_per_token(a).tolist() == counts
    rows = sum(map(sum, counts))
    assert float(a.metrics["predicted_experts_per_token"]) == pytest.approx(rows / (GROUPS * TOKENS))
    if thresholds == 0.4:
        assert differs, "affinity decides who, not the prediction"
        assert 0 < rows < GROUPS * TOKENS * EXPERTS
    assert (rows == 0) == (thresholds == 1.0)
    assert (rows == GROUPS * TOKENS * EXPERTS) == (thresholds == -0.3)


def test_of_equal_affinities_the_earlier_token_is_taken():
    ours = layer().eval()
    x = tokens()[:1, :1].repeat(1, TOKENS, 1)
    with torch.no_grad():
        ours.router.threshold.fill_(-1.0)
        ours.router.threshold[0] = 2.0
    selected = ours.router(RouterInput.of(x)).selected_GSE
    assert not selected[..., 0].any()
    assert selected[..., 1:].all()
    router = ours.router
    router._asked = lambda x_GSD: torch.where(torch.arange(TOKENS)[None, :, None] >= TOKENS - 3, 9.0, -9.0).expand(
        1, -1, EXPERTS
    )
    router.threshold.fill_(0.5)
    expected = torch.arange(TOKENS) < 3
    assert torch.equal(router(RouterInput.of(x)).selected_GSE, expected[None, :, None].expand(1, -1, EXPERTS))


def test_in_the_long_run_inference_takes_what_training_does():
    """Thresholds started at 0 aim at f_c experts per token."""
    ours = layer()
    ours.router.reset_buffers()
    assert not ours.router.threshold.any()
    for seed in range(120):
        ours.router.update_buffers(ours.router(RouterInput.of(tokens(seed))).observed)
    ours.eval()
    rows = [ours.router(RouterInput.of(tokens(seed))).selected_GSE.sum().item() for seed in range(120)]
    realised = sum(rows) / (120 * GROUPS * TOKENS)
    assert math.isclose(realised, FACTOR, rel_tol=0.1), realised
