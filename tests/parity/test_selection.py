"""The selection family and Expert Race equal plain loops over images, tokens and experts in fp64: who is chosen, values,
losses and every gradient.

Legend: G groups, I images of a group, L tokens of an image, D width, E experts, P values of a patch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from moe_configs import FAMILY, moe_config, randomised
from torch import Tensor

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import Assignment, Rows, Selection, Table, taken
from ecdit_train.model.moe import MoE
from ecdit_train.model.router import RouterInput
from ecdit_train.model.routers.expert_race import ExpertRace

GROUPS, IMAGES, TOKENS, WIDTH, EXPERTS, VALUES = 2, 2, 6, 8, 4, 5
FACTOR = 2.0
SIZES = RouterSizes(width=WIDTH, num_experts=EXPERTS, patch_values=VALUES)
RACE = {"apart": (), "gate": "identity", "pool": "ranks", "mixes": True}


def layer(name: str, *, combine: str = "index_add", cap: float | None = None) -> MoE:
    c = moe_config(name, num_experts=EXPERTS, capacity_factor=FACTOR, combine=combine, cap=cap)
    experts = c.experts.build(width=WIDTH, hidden=12, num_experts=EXPERTS)
    dispatcher = c.dispatcher.build()
    dispatcher.cap = cap
    made = MoE(c.router.build(SIZES), experts, dispatcher=dispatcher)
    randomised(made)
    with torch.no_grad():
        for b in made.buffers():
            b.fill_(0.4)
    return made


def tokens(seed: int = 1, *, coarse: bool = False) -> Tensor:
    x = torch.randn(GROUPS * IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x[:, :1].expand_as(x) if coarse else x).clone().requires_grad_()


def reference(x_BLD: Tensor, router: dict[str, Tensor], up: Tensor, down: Tensor, *, how: dict, training: bool = True
              ) -> tuple[Tensor, set[tuple[int, int, int]], Tensor]:  # fmt: skip
    """(output, chosen (image, token, expert), logits), score by score."""
    B, L, _ = x_BLD.shape
    logits = torch.stack([torch.stack([hidden(x, router, how) @ router["weight"] for x in image]) for image in x_BLD])
    score = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "identity": logits}[how["gate"]]
    problems: dict[tuple, list] = {}
    for b, s, e in product(range(B), range(L), range(EXPERTS)):
        group = 0 if how["pool"] == "ranks" and training else b // IMAGES
        key = [group] + [v for axis, v in (("batch", b), ("tokens", s), ("experts", e)) if axis in how["apart"]]
        problems.setdefault(tuple(key), []).append((-score[b, s, e].item(), b, s, e))
    chosen = set()
    for several in problems.values():
        winners = FACTOR * len(several) / EXPERTS
        assert winners == int(winners) > 0
        chosen |= {(b, s, e) for _, b, s, e in sorted(several)[: int(winners)]}
    out = [[torch.zeros_like(x) for x in image] for image in x_BLD]
    for b, s, e in sorted(chosen):
        out[b][s] = out[b][s] + score[b, s, e] * (F.gelu(x_BLD[b, s] @ up[e], approximate="tanh") @ down[e])
    return torch.stack([torch.stack(image) for image in out]), chosen, logits


def hidden(x: Tensor, router: dict[str, Tensor], how: dict) -> Tensor:
    return F.gelu(x @ router["mix"], approximate="tanh") if how.get("mixes") else x


def chosen_by(a: Assignment) -> set[tuple[int, int, int]]:
    index, _, one = taken(a)
    expert = (
        a.expert_R
        if isinstance(a, Rows)
        else torch.arange(EXPERTS)[:, None].expand(EXPERTS, len(index) // EXPERTS).flatten()
    )
    there = [(int(i) // TOKENS, int(i) % TOKENS, int(e)) for i, e, o in zip(index, expert, one, strict=True) if o]
    assert len(there) == len(set(there)), "an expert takes a token twice"
    return set(there)


def similarity(logits: Tensor, chosen: set[tuple[int, int, int]]) -> Tensor:
    """facts: W_ii = E M'_ii / sum_j M'_jj, W_ij = (E^2 - E) M'_ij / sum_{i != j} M'_ij, loss = 1/N sum_ij W_ij P'_ij."""
    E, N = EXPERTS, logits.shape[0] * logits.shape[1]
    P = logits.softmax(-1).flatten(0, 1)
    M = torch.zeros(logits.shape, dtype=torch.float64)
    for place in chosen:
        M[place] = 1
    M2, P2 = M.flatten(0, 1).t() @ M.flatten(0, 1), P.t() @ P
    diagonal = sum(M2[i, i] for i in range(E))
    others = sum(M2[i, j] for i in range(E) for j in range(E) if i != j)
    W = [[E * M2[i, i] / diagonal if i == j else (E * E - E) * M2[i, j] / others for j in range(E)] for i in range(E)]
    return sum(W[i][j] * P2[i, j] for i in range(E) for j in range(E)) / N


def check_equal(ours: MoE, how: dict, *, x: Tensor) -> Assignment:
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = torch.randn(*x.shape[:2], VALUES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, a = ours(x, group_tokens=IMAGES * TOKENS)
    predicted = sum(w * F.mse_loss(p.view_as(target), target) for w, p in a.targets.values())
    ((y * weight).sum() + sum(a.losses.values()) + predicted).backward()

    mine = {"x": x, **{f"router.{n}": p for n, p in ours.router.named_parameters()}}
    mine |= {"up": ours.experts.up, "down": ours.experts.down}
    leaves = {name: z.detach().clone().requires_grad_() for name, z in mine.items()}
    router = {n.removeprefix("router."): z for n, z in leaves.items()}
    y_ref, chosen, logits = reference(leaves["x"], router, leaves["up"], leaves["down"], how=how)
    total = (y_ref * weight).sum()
    if isinstance(ours.router.config, ExpertRace):
        config = ours.router.config
        loss = config.similarity_weight * similarity(logits, chosen)
        torch.testing.assert_close(a.losses["similarity"], loss, rtol=1e-11, atol=0)
        head = torch.stack([torch.stack([hidden(z, router, how) @ router["target"] for z in i]) for i in leaves["x"]])
        total = total + loss + config.target_weight * F.mse_loss(head, target)
        assert float(a.observed["threshold"]) == pytest.approx(
            sorted(logits.flatten().tolist())[-len(chosen)], rel=1e-12
        )
    total.backward()
    assert chosen_by(a) == chosen
    torch.testing.assert_close(y, y_ref, rtol=1e-11, atol=1e-12)
    for name, leaf in leaves.items():
        assert leaf.grad.abs().max() > 0, name
        torch.testing.assert_close(
            mine[name].grad, leaf.grad, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    return a


@pytest.mark.parametrize("combine", ["index_add", "deterministic"])
@pytest.mark.parametrize("name", [*FAMILY, "expert_race"])
def test_values_losses_gradients_and_sets(name, combine):
    check_equal(layer(name, combine=combine), FAMILY.get(name, RACE), x=tokens())


@pytest.mark.parametrize("name", ["be", "le", "tc", "expert_race"])
def test_ties_go_to_the_first(name):
    """Tokens of an image are alike, so every score comes six times; the plain loops take the first in order."""
    check_equal(layer(name), FAMILY.get(name, RACE), x=tokens(coarse=True))


@pytest.mark.parametrize(("name", "scope"), [("ec_image", "image"), ("bl_group", "group")])
def test_equal_loads_take_the_static_path(name, scope):
    """The same tables as expert choice makes, which has softmax for its gate, in whole groups or image by image."""
    ours, group = layer(name), TOKENS if scope == "image" else IMAGES * TOKENS
    ours.router.config = replace(ours.router.config, gate="softmax")
    a = ours.router(RouterInput.of(tokens().reshape(GROUPS, -1, WIDTH), image_tokens=TOKENS))
    assert isinstance(a, Table)
    assert a.filled_EGC is None
    plain = layer("expert_choice")
    plain.load_state_dict(ours.state_dict())
    b = plain.router(RouterInput.of(tokens().reshape(-1, group, WIDTH)))
    assert chosen_by(a) == chosen_by(b)
    y, z = ours(tokens(), group_tokens=IMAGES * TOKENS)[0], plain(tokens(), group_tokens=group)[0]
    torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["bl", "be", "mixed_race"])
def test_pictures_are_drawn_in_groups(name):
    """At inference images of other groups, and so of other ranks, change nothing."""
    ours = layer(name).eval()
    x = tokens().detach()
    y, a = ours(x, group_tokens=IMAGES * TOKENS)
    parameters = dict(ours.router.named_parameters())
    chosen = reference(x, parameters, ours.experts.up, ours.experts.down, how=FAMILY[name], training=False)[1]
    assert chosen_by(a) == chosen
    other = torch.cat([x[:IMAGES], 3 * x[IMAGES:]])
    assert torch.equal(ours(other, group_tokens=IMAGES * TOKENS)[0][:IMAGES], y[:IMAGES])


def test_the_race_at_inference_is_its_threshold():
    """Each score by itself against the buffer, no head, no loss; and the race itself never reads the buffer."""
    ours, x = layer("expert_race"), tokens().detach()
    trained = ours(x, group_tokens=IMAGES * TOKENS)[1]
    ours.router.threshold.fill_(99.0)
    assert chosen_by(ours(x, group_tokens=IMAGES * TOKENS)[1]) == chosen_by(trained)
    ours.router.threshold.fill_(0.25)
    ours.eval()
    a = ours(x, group_tokens=IMAGES * TOKENS)[1]
    assert not a.losses
    assert not a.targets
    assert not a.observed
    logits = reference(x, dict(ours.router.named_parameters()), ours.experts.up, ours.experts.down, how=RACE)[2]
    passed = (logits >= 0.25).nonzero().tolist()
    assert chosen_by(a) == {tuple(place) for place in passed}
    assert 0 < len(passed) < logits.numel()
    spent = len(passed) / (GROUPS * IMAGES * TOKENS)
    assert float(a.metrics["experts_per_token"]) == pytest.approx(spent)
    assert float(a.metrics["budget_used"]) == pytest.approx(spent / FACTOR)
    one = torch.cat([ours(x[b : b + 1], group_tokens=TOKENS)[0] for b in range(len(x))])
    torch.testing.assert_close(ours(x, group_tokens=IMAGES * TOKENS)[0], one, rtol=1e-12, atol=1e-13)


def test_the_threshold_follows_the_race():
    """At rest it lets through what the race lets through."""
    ours, x = layer("expert_race"), RouterInput.of(tokens().detach().reshape(GROUPS, -1, WIDTH), image_tokens=TOKENS)
    first = float(ours.router.threshold)
    observed = ours.router(x).observed["threshold"]
    ours.router.update_buffers({"threshold": observed})
    assert float(ours.router.threshold) == pytest.approx(0.9 * first + 0.1 * float(observed))
    for _ in range(400):
        ours.router.update_buffers(ours.router(x).observed)
    ours.router.threshold.sub_(1e-9)
    wanted = ours.router(x)
    assert isinstance(wanted, Selection)
    assert torch.equal(ours.router.eval()(x).selected_GSE, wanted.selected_GSE)
    assert float(wanted.metrics["budget_used"]) == pytest.approx(1.0)


def test_no_experts_share_a_token():
    """k = 1: the off-diagonal sum of M' may be 0; that part of the loss is 0 then, not NaN."""
    ours = layer("expert_race")
    x = torch.zeros(1, EXPERTS, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        ours.router.mix.copy_(torch.eye(WIDTH) * 4)
        ours.router.weight.copy_(torch.eye(WIDTH)[:, :EXPERTS])
        x[0, torch.arange(EXPERTS), torch.arange(EXPERTS)] = 1.0
    ours.router.config = replace(ours.router.config, capacity_factor=1.0)
    a = ours(x, group_tokens=EXPERTS)[1]
    assert chosen_by(a) == {(0, e, e) for e in range(EXPERTS)}
    a.losses["similarity"].backward()
    assert torch.isfinite(a.losses["similarity"])
    assert ours.router.weight.grad.abs().max() > 0
