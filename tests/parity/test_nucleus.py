"""Nucleus's sparse layer equals plain loops over images, experts and tokens: values and every gradient in fp64, with SwiGLU experts
and a shared one; and it takes what the capacity factor of its stage says.

Legend: B images, S tokens of an image, D width, H hidden width, E experts, C capacity.
"""

from __future__ import annotations

import pytest
import torch
from moe_configs import moe_config, randomised
from torch import Tensor
from torch.nn.functional import silu

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import experts_per_token
from ecdit_train.model.experts.swiglu import SwiGLU
from ecdit_train.model.moe import MoE
from ecdit_train.model.routers.nucleus import Nucleus

IMAGES, TOKENS, WIDTH, HIDDEN, EXPERTS = 3, 12, 10, 6, 4


def layer(*, scores: str = "softmax", sees: str = "timestep", schedule: tuple[tuple[int, float], ...] = ()) -> MoE:
    config = Nucleus(capacity_factor=1.0, schedule=schedule, sees=sees, scores=scores, route_scale=2.5)
    sizes = RouterSizes(width=WIDTH, num_experts=EXPERTS, patch_values=1)
    experts = SwiGLU()
    made = MoE(
        config.build(sizes),
        experts.build(width=WIDTH, hidden=HIDDEN, num_experts=EXPERTS),
        dispatcher=moe_config().dispatcher.build(),
        shared=experts.build_shared(width=WIDTH, hidden=2 * HIDDEN),
    )
    return randomised(made)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tokens = (IMAGES, TOKENS, WIDTH)
    return {"x": draw(*tokens), "normed": draw(*tokens), "hidden": draw(*tokens), "timestep": draw(IMAGES, WIDTH)}


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Matrices as (in, out)."""
    return (silu(x @ gate) * (x @ up)) @ down


def reference(
    z: dict[str, Tensor], w: dict[str, Tensor], *, scores: str, sees: str, capacity: int
) -> tuple[Tensor, Tensor]:
    """Token by token. Returns the output and who took whom, (B, S, E)."""
    outputs, chosen = [], torch.zeros(IMAGES, TOKENS, EXPERTS, dtype=torch.bool)
    for b in range(IMAGES):
        seen = {"timestep": z["normed"], "hidden": z["hidden"], "modulated": z["x"]}[sees][b]
        logits = seen @ w["router.weight"]
        if sees == "timestep":
            both = torch.cat([w["router.timestep_weight"], w["router.weight"]])
            logits = torch.stack([torch.cat([z["timestep"][b], token]) @ both for token in seen])
        s = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
        for e in range(EXPERTS):
            best = sorted(range(TOKENS), key=lambda t, s=s, e=e: -s[t, e].item())[:capacity]
            chosen[b, best, e] = True
        rows = []
        for t in range(TOKENS):
            takers = chosen[b, t].nonzero().flatten().tolist()
            x = z["x"][b, t]
            y = swiglu(x, *(w[f"shared.{n}.weight"].T for n in ("gate", "up", "down")))
            total = sum(s[t, e] for e in takers)
            for e in takers:
                y = y + 2.5 * s[t, e] / (total + 1e-12) * swiglu(
                    x, *(w[f"experts.{n}"][e] for n in ("gate", "up", "down"))
                )
            rows.append(y)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs), chosen


def run(ours: MoE, z: dict[str, Tensor]):
    return ours(z["x"], group_tokens=TOKENS, normed_BSD=z["normed"], hidden_BSD=z["hidden"], timestep_BD=z["timestep"])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sees", ["timestep", "hidden", "modulated"])
def test_values_sets_and_all_gradients(scores, sees):
    ours, z = layer(scores=scores, sees=sees), inputs()
    weight = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, a = run(ours, z)
    (y * weight).sum().backward()

    leaves = {n: t.detach().clone().requires_grad_() for n, t in z.items()}
    w = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}
    y_ref, chosen = reference(leaves, w, scores=scores, sees=sees, capacity=TOKENS // EXPERTS)
    (y_ref * weight).sum().backward()
    torch.testing.assert_close(y, y_ref, rtol=1e-11, atol=1e-12)
    for name, p in ours.named_parameters():
        assert p.grad.any(), name
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-10, atol=1e-11, msg=name)
    read = {"timestep": {"normed", "timestep"}, "hidden": {"hidden"}, "modulated": set()}[sees] | {"x"}
    for name, t in z.items():
        assert (t.grad is not None) == (name in read), name
        if name in read:
            torch.testing.assert_close(t.grad, leaves[name].grad, rtol=1e-10, atol=1e-11, msg=name)

    assert torch.equal(experts_per_token(a), chosen.sum(-1))
    assert 0 < int((chosen.sum(-1) == 0).sum()) < IMAGES * TOKENS, "some tokens must be left out, not all"
    sums = torch.zeros(IMAGES * TOKENS, dtype=torch.float64).index_add(
        0, a.index_EGC.flatten(), a.gate_EGC.detach().flatten()
    )
    taken = chosen.sum(-1).flatten() > 0
    torch.testing.assert_close(sums[taken], torch.full_like(sums[taken], 2.5))
    torch.testing.assert_close(a.probability_GSE.sum(-1), torch.ones(IMAGES, TOKENS, dtype=torch.float64))


def test_the_expert_works_on_the_modulated_token_and_the_router_does_not_see_it():
    ours, z = layer(), inputs()
    _, before = run(ours, z)
    _, after = run(ours, z | {"x": 3.0 * z["x"]})
    assert torch.equal(before.index_EGC, after.index_EGC)
    assert torch.equal(before.gate_EGC, after.gate_EGC)
    _, other = run(ours, z | {"timestep": z["timestep"].flip(0)})
    assert not torch.equal(before.index_EGC.sort(-1).values, other.index_EGC.sort(-1).values)


def test_every_stage_is_the_constant_router_of_its_factor():
    """0 to 9 updates: 1 expert per token; 10 to 19: 4; from 20 on: 2."""
    ours, z = layer(schedule=((10, 4.0), (20, 2.0))), inputs()
    for step, capacity in ((20, 6), (0, 3), (9, 3), (10, 12), (19, 12), (1000, 6)):
        ours.router.at_step(step)
        w = {n: p.detach() for n, p in ours.named_parameters()}
        y, a = run(ours, z)
        assert a.index_EGC.shape == (EXPERTS, IMAGES, capacity), step
        expected, _ = reference(z, w, scores="softmax", sees="timestep", capacity=capacity)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)


def test_a_stage_is_one_static_graph():
    """Compiled, each stage is traced once, with its capacity as a constant; going back needs no new graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, plain, z = (*(layer(schedule=((10, 4.0), (20, 2.0))) for _ in range(2)), inputs())
    ours.compile(backend="aot_eager", fullgraph=True)
    graphs = []
    for step in (0, 1, 9, 10, 19, 20, 0):
        for moe in (ours, plain):
            moe.router.at_step(step)
        torch.testing.assert_close(run(ours, z)[0], run(plain, z)[0])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 2, 2, 3, 3]
