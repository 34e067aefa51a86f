"""`model.lean` gives what `model.moe.plain` gives, values and every gradient, and keeps half of it.

Legend: E experts, D hidden width, H expert hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor

from benchmarks.layers import fill, kept_rows
from ecdit_train.config.schema import Recipe
from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import Table
from ecdit_train.model.dispatchers.deterministic import DeterministicDispatcher
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.experts.gelu import GeluExperts
from ecdit_train.model.experts.swiglu import SwiGLUExperts
from ecdit_train.model.experts.two_layers import TwoLayers
from ecdit_train.model.fp8 import Fp8Product
from ecdit_train.model.lean import lean
from ecdit_train.model.moe import Dispatcher, Experts, Form, MoE, plain
from ecdit_train.model.routers.expert_choice import ExpertChoice, ExpertChoiceRouter

EXPERTS = {"gelu": GeluExperts, "swiglu": SwiGLUExperts}
DISPATCHERS: dict[str, Callable[[], Dispatcher]] = {
    "index_add": IndexAddDispatcher,
    "deterministic": DeterministicDispatcher,
}


class Shuffled:
    """A travel whose experts live apart, two to a "rank": rows arrive in another order and another shape than they left, as they
    do over ranks, and in copies."""

    def __init__(self) -> None:
        self.in_flight = 0

    def send_out(self, x_EsD: Tensor) -> Tensor:
        self.in_flight += 1
        return x_EsD.flip(1).clone()

    def receive_out(self, x_EsD: Tensor) -> Tensor:
        self.in_flight -= 1
        return x_EsD

    def send_back(self, y_eRD: Tensor) -> Tensor:
        self.in_flight += 1
        return y_eRD.clone()

    def receive_back(self, y_EsD: Tensor) -> Tensor:
        self.in_flight -= 1
        return y_EsD.flip(1)


def layer(
    form: Form,
    *,
    experts: str = "gelu",
    dispatcher: str = "index_add",
    E: int = 4,
    D: int = 12,
    H: int = 20,
    dtype: torch.dtype = torch.float64,
    factor: float = 2.0,
    chunks: int = 1,
    travels: bool = False,
) -> MoE:
    """The same weights for every form."""
    router = ExpertChoiceRouter(
        RouterSizes(width=D, num_experts=E, patch_values=1),
        config=ExpertChoice(capacity_factor=factor, sees="modulated"),
    )
    chosen = DISPATCHERS[dispatcher]()
    chosen.chunks, chosen.travel = chunks, Shuffled() if travels else None
    moe = MoE(router, EXPERTS[experts](D, hidden=H, num_experts=E), dispatcher=chosen, form=form)
    fill(moe, seed=3)
    moe.to(dtype)
    moe.router.to(torch.promote_types(dtype, torch.float32))
    return moe


def run(moe: MoE, *, tokens: int = 32, groups: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What comes out, and every gradient."""
    generator = torch.Generator().manual_seed(1)
    D = moe.router.weight.shape[0]
    x = torch.randn(groups, tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(groups, tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    y, _ = moe(x, group_tokens=tokens)
    y.backward(weight)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in moe.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("E", "factor", "groups"), [(4, 2.0, 2), (1, 1.0, 1), (8, 0.5, 3), (2, 2.0, 1)])
def test_it_is_the_plain_layer(experts: str, dispatcher: str, E: int, factor: float, groups: int) -> None:
    made = [
        run(layer(form, experts=experts, dispatcher=dispatcher, E=E, factor=factor), groups=groups)
        for form in (plain, lean)
    ]
    assert made[0].keys() == made[1].keys()
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_rows_that_travel_in_parts(experts: str, chunks: int) -> None:
    moe = layer(lean, experts=experts, chunks=chunks, travels=True)
    got, expected = run(moe), run(layer(plain, experts=experts))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert isinstance(moe.dispatcher.travel, Shuffled)
    assert moe.dispatcher.travel.in_flight == 0


@pytest.mark.parametrize("experts", EXPERTS)
def test_gradients_against_differences(experts: str) -> None:
    """Nothing of ours on the other side: numerical derivatives of everything that goes in, empty slots among it."""
    generator = torch.Generator().manual_seed(5)
    E, s, N, D, H = 3, 4, 7, 4, 6
    module = EXPERTS[experts](D, hidden=H, num_experts=E).double()
    fill(module, seed=1)
    index = torch.randint(N, (E, s), generator=generator)
    gate = torch.rand(E, s, generator=generator, dtype=torch.float64)
    gate[0, 1] = 0.0  # a slot that nobody filled has a gradient, too
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    names = list(dict(module.named_parameters()))

    def function(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        table = Table(index_EGC=index[:, None], gate_EGC=gate[:, None], probability_GSE=torch.zeros(1, N, E))
        with torch.no_grad():
            for name in names:
                module._parameters.pop(name, None)
        for name, weight in zip(names, weights, strict=True):
            object.__setattr__(module, name, weight)
        return lean(module, IndexAddDispatcher(), x, table)

    inputs = [x, gate, *(p.detach().clone() for p in module.parameters())]
    assert torch.autograd.gradcheck(function, tuple(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("experts", EXPERTS)
def test_in_bf16_both_are_as_far_from_the_truth(experts: str) -> None:
    """Each gradient's distance from fp64 (bf16-rounded weights and tokens, the same choices): at most 1 % more than plain's."""
    truth = layer(plain, experts=experts, D=64, H=256, E=8, dtype=torch.bfloat16)
    for p in truth.parameters():
        p.data = p.data.double()
    exact = _in_double(truth, tokens=64)
    far = {}
    for name, form in (("plain", plain), ("lean", lean)):
        moe = layer(form, experts=experts, D=64, H=256, E=8, dtype=torch.bfloat16)
        got = run(moe, tokens=64, dtype=torch.bfloat16)
        far[name] = {key: float((got[key].double() - exact[key]).norm() / exact[key].norm()) for key in exact}
    for key, distance in far["plain"].items():
        assert far["lean"][key] <= 1.01 * distance + 1e-4, f"{key}: {far['lean'][key]:.2e} against {distance:.2e}"
        assert far["lean"][key] < 2e-2, key


def _in_double(moe: MoE, *, tokens: int) -> dict[str, Tensor]:
    """`run` in fp64 on what a bf16 run is given."""
    generator = torch.Generator().manual_seed(1)
    D = moe.router.weight.shape[0]
    x, weight = (
        torch.randn(2, tokens, D, generator=generator, dtype=torch.float64).bfloat16().double() for _ in range(2)
    )
    x.requires_grad_()
    y, _ = moe(x, group_tokens=tokens)
    y.backward(weight)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in moe.named_parameters() if p.grad is not None}}


def in_8_bits(moe: MoE, recipe: Recipe) -> MoE:
    assert isinstance(moe.experts, TwoLayers)
    moe.experts.products = tuple(Fp8Product(recipe, stack=w.shape[0]) for w in moe.experts.matrices())
    for product in moe.experts.products if recipe == "delayed" else ():
        product.reset_buffers()
    return moe


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("recipe", ["current", "delayed", "mxfp8"])
def test_in_8_bits_both_are_as_far_from_the_truth(experts: str, recipe: Recipe) -> None:
    """Forward they round the same operands; backward plain rounds g dy, a, dh and x, lean dy, g a, g dh and x. A gate's gradient is
    <dy, y> in plain and <a, da> in lean, one rounding more: the router's is a third farther off."""
    shape: dict[str, Any] = {"experts": experts, "D": 64, "H": 128, "E": 8}
    exact = run(layer(plain, **shape), tokens=64)
    one, other = (run(in_8_bits(layer(form, **shape), recipe), tokens=64) for form in (plain, lean))
    torch.testing.assert_close(other["y"], one["y"], rtol=1e-12, atol=1e-12)
    for key in exact:
        distances = [((got[key] - exact[key]).norm() / exact[key].norm()).item() for got in (one, other)]
        assert 0.01 < distances[1] < min(1.5 * distances[0], 0.12), f"{key}: {distances}"


def test_what_delayed_remembers_of_a_lean_layer() -> None:
    """Of a and W what plain sees, and of x; of the gradient behind the experts what comes before gates, none above 1."""
    seen = []
    for form in (plain, lean):
        moe = in_8_bits(layer(form, D=64, H=128, chunks=2 if form is lean else 1, travels=form is lean), "delayed")
        run(moe, tokens=64)
        assert isinstance(moe.experts, TwoLayers)
        seen.append([product.seen for product in moe.experts.products])  # type: ignore[attr-defined]
    for before, now in zip(*seen, strict=True):
        for role in ("x", "w"):
            torch.testing.assert_close(now[role], before[role])
    assert (seen[1][1]["dy"] >= seen[0][1]["dy"]).all()


def test_a_lean_layer_that_draws_multiplies_in_its_own_type() -> None:
    x = torch.randn(2, 32, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        (one, _), (other, _) = (moe(x, group_tokens=32) for moe in (layer(lean), in_8_bits(layer(lean), "current")))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_kept(dtype: torch.dtype) -> None:
    """The paper's experts, hidden width 4 d: 4 and what stands in tables; 1 more for rows that an exchange brought."""
    slots = (8 + 8 + 4 + 4 * 8 / 2) / (128 * dtype.itemsize)  # two indices, a gate, and scores of half a token
    x = torch.randn(2, 256, 128).to(dtype)

    def kept(form: Form, **more: Any) -> float:
        return kept_rows(layer(form, D=128, H=512, E=8, dtype=dtype, **more), x, capacity_factor=2.0)

    assert kept(plain) > 11
    assert 4 <= kept(lean) <= 4 + slots
    assert 5 <= kept(lean, travels=True, chunks=2) <= 5 + slots


def test_experts_of_another_form_are_refused_before_they_run() -> None:
    class Own(Experts):
        def compute(self, x_eRD: Tensor) -> Tensor:
            return x_eRD

    moe = layer(lean)
    moe.experts = Own(4)
    with pytest.raises(AssertionError, match="a rule of the configuration"):
        run(moe)


def test_an_activation_is_asked_for_once_each_way() -> None:
    """No product is repeated: backward makes the activation again and nothing else."""
    seen: list[str] = []

    class Counted(GeluExperts):
        def activate_forward(self, h_eRH: tuple[Tensor, ...]) -> Tensor:
            seen.append("forward")
            return super().activate_forward(h_eRH)

    moe = layer(lean)
    counted = Counted(12, hidden=20, num_experts=4).double()
    counted.load_state_dict(moe.experts.state_dict())
    moe.experts = counted
    assert isinstance(counted, TwoLayers)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as lean_flops:
        run(moe)
    assert seen == ["forward"]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as plain_flops:
        run(layer(plain))
    assert lean_flops.get_total_flops() == plain_flops.get_total_flops()
