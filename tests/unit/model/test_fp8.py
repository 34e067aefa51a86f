"""The arithmetic of 8-bit products against torch's own scaled product, and against exact sums."""

import pytest
import torch

from ecdit_train.model.fp8 import BLOCK, E4M3, E5M2, Fp8Product, block_scale, power_of_two, quantise, remember

RECIPES = ("current", "delayed", "mxfp8")


def product(recipe, stack=1):
    made = Fp8Product(recipe, stack=stack)
    if recipe == "delayed":
        made.reset_buffers()
    return made


def random(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_scale_is_the_least_power_of_two_that_holds(fp8):
    most = torch.finfo(fp8).max
    amax = torch.cat([torch.logspace(-30, 30, 200), torch.tensor([most, most * 2, most / 4])])
    s = power_of_two(amax, fp8).double()
    assert (torch.frexp(s).mantissa == 0.5).all()
    assert (amax.double() <= s * most).all()
    assert (amax.double() > s / 2 * most).all()


def test_scale_of_nothing_of_too_little_and_of_what_is_not_finite():
    amax = torch.tensor([0.0, 1e-45, torch.inf, torch.nan, 3e38])
    zero, tiny, inf, nan, huge = power_of_two(amax, E4M3).tolist()
    assert zero == 1.0
    assert tiny == 2.0**-126
    assert inf != inf
    assert nan != nan
    assert 0 < huge < float("inf")


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_values_are_exact_in_bf16(fp8):
    t = random(64, 64, dtype=torch.bfloat16, scale=1e-4)
    wide = quantise(t, power_of_two(t.abs().max().float(), fp8), fp8).wide(torch.float32)
    assert torch.equal(wide, wide.bfloat16().float())
    # Relative to its size where it is normal, else to the smallest step.
    bits = {E4M3: 4, E5M2: 3}[fp8]
    s = power_of_two(t.abs().max().float(), fp8)
    normal = t.float().abs() >= torch.finfo(fp8).smallest_normal * s
    error = ((wide - t.float()).abs() / t.float().abs())[normal]
    assert error.max() <= 2.0**-bits
    assert error.max() > 2.0 ** (-bits - 1)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_saturates_and_what_is_not_finite_stays_so(fp8):
    most, one = torch.finfo(fp8).max, torch.ones(())
    t = torch.tensor([2 * most, -1e30, torch.inf, -torch.inf, torch.nan, 0.0])
    out = quantise(t, one, fp8).wide(torch.float32)
    assert out[:2].tolist() == [most, -most]
    assert out[2:5].isnan().all()
    assert out[5] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_value_that_is_not_finite_is_seen_behind_the_product(recipe):
    for bad in (torch.inf, torch.nan):
        for where in ("x", "w"):
            x, w = random(32, 64), random(48, 64, seed=1)
            (x if where == "x" else w)[3, 5] = bad
            assert not product(recipe).linear(x.requires_grad_(), w).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_that_are_not_finite_are_seen(recipe):
    x, w = random(32, 64).requires_grad_(), random(48, 64, seed=1).requires_grad_()
    dy = random(32, 48, seed=2)
    dy[1, 2] = torch.inf
    product(recipe).linear(x, w).backward(dy)
    assert not x.grad.isfinite().all()
    assert not w.grad.isfinite().all()


def scaled_mm(a, b, fp8_a, fp8_b, *, out=torch.float32):
    """torch's own a b of 8-bit operands with one scale each: the other witness."""
    s_a, s_b = (power_of_two(t.abs().max().float(), f) for t, f in ((a, fp8_a), (b, fp8_b)))
    low_a = (a.float() / s_a).to(fp8_a)
    low_b = (b.float() / s_b).to(fp8_b).t().contiguous().t()
    return torch._scaled_mm(low_a.contiguous(), low_b, scale_a=s_a, scale_b=s_b, out_dtype=out)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 300.0])
def test_per_tensor_is_torchs_scaled_product(scale):
    """Forward and both gradients; sums may be in another order."""
    x, w, dy = random(32, 64, scale=scale), random(48, 64, seed=1), random(32, 48, seed=2, scale=scale / 7)
    x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = product("current").linear(x_, w_)
    y.backward(dy)
    torch.testing.assert_close(y, scaled_mm(x, w.t(), E4M3, E4M3), rtol=1e-6, atol=1e-6 * y.abs().max().item())
    for ours, theirs in (
        (x_.grad, scaled_mm(dy, w, E5M2, E4M3)),
        (w_.grad, scaled_mm(dy.t(), x, E5M2, E4M3)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * ours.abs().max().item())


def test_blocks_are_those_along_what_is_summed_over():
    t = random(2, 70, 40)
    for along in (1, 2):
        s = block_scale(t, E4M3, along=along)
        assert s.shape == t.shape
        for e in range(2):
            for i in range(0, t.shape[along], BLOCK):
                part = t[e].narrow(along - 1, i, min(BLOCK, t.shape[along] - i))
                want = power_of_two(part.abs().amax(along - 1), E4M3)
                got = s[e].narrow(along - 1, i, part.shape[along - 1])
                assert torch.equal(got, want.unsqueeze(along - 1).expand_as(got))


def test_blocks_hold_what_one_scale_loses():
    """A row of tiny values beside a row of large ones: under one scale it vanishes."""
    x, w = random(2, 64), random(48, 64, seed=1)
    x[0] *= 1e-6
    want = x @ w.t()
    w.requires_grad_()
    assert (product("current").linear(x, w)[0] == 0).all()
    error = (product("mxfp8").linear(x, w)[0] - want[0]).norm() / want[0].norm()
    assert error < 0.06


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_near_those_of_the_product(recipe, dtype):
    """Rounding errors of rows are independent: relative to the norm, E4M3 loses about 2.6 % and E5M2 5.2 % of each operand."""
    x, w, dy = (random(*s, seed=n, dtype=dtype) for n, s in enumerate(((3, 40, 64), (3, 64, 48), (3, 40, 48))))
    one, other = [t.clone().requires_grad_() for t in (x, w)], [t.clone().requires_grad_() for t in (x, w)]
    y, want = product(recipe, stack=3)(*one), torch.bmm(*other)
    y.backward(dy)
    want.backward(dy)
    for got, ref, bound in ((y, want, 0.05), (one[0].grad, other[0].grad, 0.08), (one[1].grad, other[1].grad, 0.08)):
        assert got.dtype == dtype
        assert 0.005 < (got - ref).norm() / ref.norm() < bound


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_of_a_stack_by_itself(recipe):
    x, w = random(3, 32, 64), random(3, 64, 48, seed=1)
    x[1] *= 1e3
    w[2] *= 1e-3
    w.requires_grad_()
    together = product(recipe, stack=3)(x, w)
    alone = torch.cat([product(recipe)(x[e : e + 1], w[e : e + 1]) for e in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows(recipe):
    x, w = random(2, 0, 64).requires_grad_(), random(2, 64, 48, seed=1).requires_grad_()
    y = product(recipe, stack=2)(x, w)
    y.sum().backward()
    assert y.shape == (2, 0, 48)
    assert (w.grad == 0).all()
    assert product(recipe).linear(random(3, 0, 64).requires_grad_(), random(48, 64)).shape == (3, 0, 48)


def test_delayed_takes_the_largest_remembered():
    p, x, w = product("delayed"), random(32, 64).requires_grad_(), random(48, 64, seed=1)
    assert torch.equal(p.linear(x, w), product("current").linear(x, w))  # nothing is remembered yet
    p.amax[0, 0, 5] = 4096 * x.abs().max()
    p.amax[0, 0, 2] = 1.0
    s = power_of_two(4096 * x.abs().max(), E4M3)
    want = (
        quantise(x, s, E4M3).wide(torch.float32)
        @ quantise(w, power_of_two(w.abs().max(), E4M3), E4M3).wide(torch.float32).t()
    )
    torch.testing.assert_close(p.linear(x, w), want)


def test_delayed_watches_passes_that_train():
    p, x, w = product("delayed"), random(32, 64).requires_grad_(), random(48, 64, seed=1).requires_grad_()
    with torch.no_grad():
        p.linear(100 * x, w)
    assert not p.seen
    for k in (1.0, 3.0, 2.0):  # three microbatches, in any order: the largest
        p.linear(k * x, w).sum().backward()
    assert p.seen["x"].item() == (3 * x).abs().max().item()
    assert p.seen["w"].item() == w.abs().max().item()
    assert p.seen["dy"].item() == 1.0


def test_without_gradients_it_is_the_plain_product():
    """What is drawn does not depend on how large another picture in the batch is."""
    x, w = random(4, 32, 64), random(48, 64, seed=1)
    with torch.no_grad():
        assert torch.equal(product("current").linear(x, w), torch.nn.functional.linear(x, w))


def test_remembered_newest_first_and_refused_whole():
    p, x, w = product("delayed"), random(32, 64).requires_grad_(), random(48, 64, seed=1).requires_grad_()
    for k in (1.0, 2.0):
        p.linear(k * x, w).sum().backward()
        remember(p, maximum=lambda v: v)
    top = x.abs().max().item()
    assert p.amax[0, 0, :3].tolist() == [2 * top, top, 0.0]
    assert not p.seen
    before = p.amax.clone()
    p.linear(torch.full_like(x, torch.nan), w).sum().backward()
    remember(p, maximum=lambda v: v, refuse=torch.ones(()))
    assert torch.equal(p.amax, before)
    p.linear(x, w).sum().backward()
    remember(p, maximum=lambda v: v, refuse=torch.zeros(()))
    assert p.amax[0, 0, :4].tolist() == [top, 2 * top, top, 0.0]


@pytest.mark.parametrize("shape", [(3, 32, 64, 48), (2, 5, 64, 48), (1, 33, 16, 16)])
def test_both_backends_agree(shape):
    """torch's scaled product takes whole units of 16 of what is summed over: rows are filled up."""
    e, R, K, O = shape
    got = []
    for backend in ("emulated", "scaled_mm"):
        x, w = random(e, R, K, dtype=torch.bfloat16).requires_grad_(), random(e, K, O, seed=1, dtype=torch.bfloat16)
        w.requires_grad_()
        y = Fp8Product("current", stack=e, backend=backend)(x, w)
        y.backward(random(e, R, O, seed=2, dtype=torch.bfloat16))
        got.append((y, x.grad, w.grad))
    for one, other in zip(*got, strict=True):  # both sum in fp32 and round once
        assert ((one - other).float().norm() / one.float().norm()).item() < 2e-3
        assert one.dtype == other.dtype == torch.bfloat16
