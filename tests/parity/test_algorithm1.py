"""The sparse layer is the paper's Algorithm 1: values and every gradient in fp64, and nothing else is
allocated on the way.

Legend: G pools, S tokens of a pool, D width, H hidden width, E experts, C capacity, B images.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moe_configs import moe_config, randomised
from plain_configs import model_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecdit_train.model.assignment import experts_per_token
from ecdit_train.model.dit import make_moe
from ecdit_train.model.moe import MoE
from ecdit_train.model.router import whole_capacity
from ecdit_train.model.routers.expert_choice import ExpertChoice

IMAGES, TOKENS, WIDTH = 8, 16, 12
GROUPS = {"image": TOKENS, "group": 4 * TOKENS, "batch": IMAGES * TOKENS}


def layer(
    *, experts: int, capacity_factor: float, combine: str = "index_add", width: int = WIDTH, ffn_ratio: int = 2
) -> MoE:
    model = model_config(width=width, heads=1, ffn_ratio=ffn_ratio, patch=1, text_refiner_layers=0)
    moe = moe_config(num_experts=experts, capacity_factor=capacity_factor, combine=combine)
    made = make_moe(model, moe, patch_values=4)
    return randomised(made, std=0.5, seed=experts)


def tokens(seed: int = 0, *, images: int = IMAGES, per_image: int = TOKENS, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, per_image, width, generator=generator, dtype=torch.float64)


def algorithm1(x_p: Tensor, w_r: Tensor, experts: list[tuple[Tensor, Tensor]], capacity: int) -> Tensor:
    """The paper's pseudocode, line by line; its batch axis holds routing pools."""
    logits = torch.einsum("bsd,de->bse", x_p, w_r)
    affinity = F.softmax(logits, dim=-1)
    affinity = torch.einsum("bse->bes", affinity)
    gating, index = torch.topk(affinity, k=capacity, dim=-1)
    dispatch = F.one_hot(index, num_classes=x_p.shape[1]).to(x_p.dtype)
    x_in = torch.einsum("becs,bsd->becd", dispatch, x_p)
    x_e = [F.gelu(x_in[:, e] @ w1, approximate="tanh") @ w2 for e, (w1, w2) in enumerate(experts)]
    x_e = torch.stack(x_e, dim=1)
    return torch.einsum("becs,bec,becd->bsd", dispatch, gating, x_e)


@pytest.mark.parametrize("combine", ["index_add", "deterministic", "triton"])
@pytest.mark.parametrize("capacity_factor", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("scope", GROUPS)
@pytest.mark.parametrize("experts", [4, 8, 16])
def test_layer_is_algorithm_1_in_values_and_all_gradients(experts, scope, capacity_factor, combine):
    pool = GROUPS[scope]
    ours = layer(experts=experts, capacity_factor=capacity_factor, combine=combine)
    weight = tokens(seed=1)
    x = tokens().requires_grad_()
    y, _ = ours(x, group_tokens=pool)
    (y * weight).sum().backward()

    x_ref = tokens().requires_grad_()
    w_r = ours.router.weight.detach().clone().requires_grad_()
    pairs = [
        (up.clone().requires_grad_(), down.clone().requires_grad_())
        for up, down in zip(ours.experts.up.detach(), ours.experts.down.detach(), strict=True)
    ]
    y_ref = algorithm1(x_ref.view(-1, pool, WIDTH), w_r, pairs, int(pool * capacity_factor / experts)).view_as(x_ref)
    (y_ref * weight).sum().backward()

    torch.testing.assert_close(y, y_ref, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.router.weight.grad, w_r.grad, rtol=1e-11, atol=1e-12)
    assert w_r.grad.abs().max() > 0
    for e, (up, down) in enumerate(pairs):
        assert up.grad.abs().max() > 0
        torch.testing.assert_close(ours.experts.up.grad[e], up.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours.experts.down.grad[e], down.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("combine", ["index_add", "deterministic", "triton"])
@pytest.mark.parametrize("scope", ["image", "group"])
def test_tokens_outside_the_pool_have_no_influence_and_tokens_inside_have(scope, combine):
    pool = GROUPS[scope]
    ours = layer(experts=8, capacity_factor=2.0, combine=combine)
    before = tokens()
    after = before.clone()
    after.view(-1, pool, WIDTH)[1] += tokens(seed=2).view(-1, pool, WIDTH)[1]
    a, b = (ours(x, group_tokens=pool)[0].view(-1, pool, WIDTH) for x in (before, after))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[2:], b[2:])
    assert not torch.equal(a[1], b[1])

    nudged = before.clone().view(-1, WIDTH)
    nudged[0] = 3.0 * tokens(seed=3).view(-1, WIDTH)[0]
    moved = (ours(nudged.view_as(before), group_tokens=pool)[0].view(-1, WIDTH) - a.view(-1, WIDTH)).abs().amax(1) > 0
    assert moved[1:pool].any(), "another token of the pool gained or lost an expert"
    assert not moved[pool:].any()


def test_whole_batch_is_one_pool():
    ours = layer(experts=8, capacity_factor=2.0)
    before, after = tokens(), tokens()
    after[-1] = 4.0 * tokens(seed=5)[-1]
    a, b = (ours(x, group_tokens=GROUPS["batch"])[0] for x in (before, after))
    assert not torch.equal(a[0], b[0])


@pytest.mark.parametrize("scope", GROUPS)
@pytest.mark.parametrize("experts", [4, 16])
def test_every_expert_takes_exactly_its_best_tokens_of_every_pool(experts, scope):
    pool = GROUPS[scope]
    _, a = layer(experts=experts, capacity_factor=2.0)(tokens(), group_tokens=pool)
    num_pools, capacity = IMAGES * TOKENS // pool, 2 * pool // experts
    assert a.index_EGC.shape == a.gate_EGC.shape == (experts, num_pools, capacity)
    assert a.filled_EGC is None
    assert a.filled_EGC is None
    for e in range(experts):
        for g in range(num_pools):
            chosen = a.index_EGC[e, g].tolist()
            best = a.probability_GSE[g, :, e].topk(capacity)
            assert len(set(chosen)) == capacity
            assert set(chosen) == {g * pool + s for s in best.indices.tolist()}
            torch.testing.assert_close(a.gate_EGC[e, g].sort().values, best.values.sort().values)
    taken = experts_per_token(a)
    assert taken.shape == (num_pools, pool)
    assert taken.sum(1).tolist() == [experts * capacity] * num_pools
    assert torch.equal(taken.flatten(), torch.bincount(a.index_EGC.flatten(), minlength=IMAGES * TOKENS))


def test_tokens_nobody_chose_get_zero():
    ours = layer(experts=8, capacity_factor=1.0)
    y, a = ours(tokens(), group_tokens=GROUPS["group"])
    left = experts_per_token(a).flatten() == 0
    assert left.any()
    assert (y.view(-1, WIDTH)[left] == 0).all()


def test_capacity_never_exceeds_the_pool():
    ours = layer(experts=4, capacity_factor=4.0)
    _, a = ours(tokens(), group_tokens=GROUPS["image"])
    assert (experts_per_token(a) == 4).all()


@pytest.mark.parametrize(
    ("pool", "factor", "experts", "capacity"), [(100, 1.1, 10, 11), (100, 1.1, 5, 22), (64, 0.25, 4, 4)]
)
def test_capacity_is_whole_up_to_rounding(pool, factor, experts, capacity):
    exact = ExpertChoice(capacity_factor=factor, sees="modulated").capacity(group_tokens=pool, num_experts=experts)
    assert whole_capacity(exact, tokens=pool) == capacity


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operators made, forward and backward; views and in-place results do not count. Holds no
    tensor: a gradient that somebody else holds would be copied into its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {z.untyped_storage().data_ptr() for z in tree_leaves((args, kwargs)) if isinstance(z, Tensor)}
        made = [z for z in tree_leaves(out) if isinstance(z, Tensor) and z.untyped_storage().data_ptr() not in given]
        self.sizes += [z.numel() for z in made]
        return out


WIDE = {"experts": 8, "pool": 256, "capacity": 64, "width": 10, "hidden": 20}


@pytest.mark.parametrize("combine", ["index_add", "deterministic", "triton"])
def test_no_one_hot_and_one_gradient_per_stacked_weight(combine):
    ours = layer(experts=WIDE["experts"], capacity_factor=2.0, combine=combine, width=WIDE["width"])
    x = tokens(images=2, per_image=WIDE["pool"], width=WIDE["width"]).requires_grad_()
    with Allocations() as allocations:
        ours(x, group_tokens=WIDE["pool"])[0].sum().backward()
    one_hot = WIDE["experts"] * WIDE["capacity"] * WIDE["pool"]
    assert max(allocations.sizes) < one_hot // 4
    assert allocations.sizes.count(ours.experts.up.numel()) == 2, "one gradient for each of the two stacked weights"


def test_the_allocation_check_has_teeth():
    """Algorithm 1 with `W[e]` on stacked weights trips both of its limits."""
    ours = layer(experts=WIDE["experts"], capacity_factor=2.0, width=WIDE["width"])
    x = tokens(images=2, per_image=WIDE["pool"], width=WIDE["width"]).requires_grad_()
    up, down = ours.experts.up, ours.experts.down
    with Allocations() as allocations:
        algorithm1(
            x, ours.router.weight, [(up[e], down[e]) for e in range(WIDE["experts"])], WIDE["capacity"]
        ).sum().backward()
    assert max(allocations.sizes) >= WIDE["experts"] * WIDE["capacity"] * WIDE["pool"]
    assert allocations.sizes.count(up.numel()) >= 2 * WIDE["experts"]


def test_bf16_tokens_are_routed_in_fp32():
    ours = layer(experts=8, capacity_factor=2.0).to(torch.bfloat16)
    x = tokens().to(torch.bfloat16)
    y, a = ours(x, group_tokens=GROUPS["group"])
    assert y.dtype == torch.bfloat16
    assert a.gate_EGC.dtype == a.probability_GSE.dtype == torch.float32
    expected = (x.float().view(-1, GROUPS["group"], WIDTH) @ ours.router.weight.float()).softmax(-1)
    assert torch.equal(a.probability_GSE, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x, group_tokens=GROUPS["group"])[1].probability_GSE, expected)


def test_deterministic_combine_sums_in_expert_order():
    """Adding the experts of a token one by one, in their order, gives the same bits."""
    ours = layer(experts=8, capacity_factor=3.0, combine="deterministic").float()
    x = tokens().float()
    y, a = ours(x, group_tokens=GROUPS["group"])
    rows = ours.experts(x.view(-1, WIDTH)[a.index_EGC.flatten()].view(8, -1, WIDTH)).view(-1, WIDTH)
    expected = torch.zeros(IMAGES * TOKENS, WIDTH)
    for slot, token in enumerate(a.index_EGC.flatten().tolist()):
        expected[token] += rows[slot] * a.gate_EGC.flatten()[slot]
    assert torch.equal(y.view(-1, WIDTH), expected)
