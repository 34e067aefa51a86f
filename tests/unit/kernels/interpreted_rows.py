"""Kernels of `rows` and `gelu` against their twins, through Triton's interpreter: test_kernels_interpreted.py runs
this file with TRITON_INTERPRET=1.

Odd on purpose: no rows, one row, widths beside and beyond a block, tokens named often or never.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ecdit_train.kernels import gelu, language, rows
from ecdit_train.model.dispatchers.triton import TritonDispatcher

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 0, 16), (0, 0, 8), (7, 12, 33), (3, 9, 1030), (40, 25, 64)]
"""N tokens, R rows, D width."""


def close(a, b):
    """Within some roundings of their type. In fp32 kernels sum in another order than torch, and torch's own GELU is off by more."""
    rounding = max(torch.finfo(b.dtype).eps, 1e-6)
    torch.testing.assert_close(a, b, rtol=2 * rounding, atol=4 * rounding)


def case(N, R, D, dtype):
    g = torch.Generator().manual_seed(N + R + D)
    index = torch.randint(max(N, 1), (R,), generator=g)
    if R > 3:
        index[:3] = index[0]  # one token three times
    x, y = torch.randn(N, D, generator=g).to(dtype), torch.randn(R, D, generator=g).to(dtype)
    return x, y, index, torch.rand(R, generator=g) - 0.3


def test_kernels_are_what_runs():
    assert language.INTERPRETED
    assert all(language.runs(torch.zeros(1, dtype=t)) for t in TYPES)
    assert not language.runs(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("N", "R", "D"), SHAPES)
def test_gather(N, R, D, dtype):
    x, _, index, gate = case(N, R, D, dtype)
    assert torch.equal(rows.gather_rows(x, index), rows.gather_rows_twin(x, index))
    close(rows.gather_rows(x, index, gate_R=gate), rows.gather_rows_twin(x, index, gate_R=gate))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("N", "R", "D"), SHAPES)
def test_sum(N, R, D, dtype):
    x, y, index, gate = case(N, R, D, dtype)
    lists = rows.list_rows(index, num_tokens=N)
    for g in (None, gate):
        once = rows.sum_rows(y, lists, gate_R=g)
        close(once, rows.sum_rows_twin(y, lists, gate_R=g))
        assert torch.equal(once, rows.sum_rows(y, lists, gate_R=g))
    a, dot = rows.weigh_backward(x, y, index, gate_R=gate)
    b, expected = rows.weigh_backward_twin(x, y, index, gate_R=gate)
    close(a, b)
    torch.testing.assert_close(dot, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (0, 7), (5, 0), (3, 33), (2, 1030), (2, 3, 33)])
def test_gelu(shape, dtype):
    g = torch.Generator().manual_seed(shape[-1])
    h, da = (3 * torch.randn(shape, generator=g)).to(dtype), torch.randn(shape, generator=g).to(dtype)
    close(gelu.gelu_rows(h), gelu.gelu_rows_twin(h))
    gate = torch.randn(shape[:-1], generator=g).to(dtype)
    got, expected = (f(h, da, gate) for f in (gelu.gelu_backward_rows, gelu.gelu_backward_rows_twin))
    close(got[0], expected[0])
    close(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-4)


def test_gelu_is_closer_to_the_truth_than_torch_in_fp32():
    def torchs(h, da, gate):
        return F.gelu(h, approximate="tanh"), torch.ops.aten.gelu_backward(da, h, approximate="tanh")

    h = torch.linspace(-12, 12, 4001)[None]
    one, gate = torch.ones_like(h), torch.ones(1)
    truth = torchs(h.double(), one.double(), gate)
    for place in (0, 1):
        kernel, own = ((f(h, one, gate)[place] - truth[place]).abs().max() for f in (gelu.gelu_backward_rows, torchs))
        assert kernel <= max(own, 1e-6), place


def test_gelu_far_out():
    h = torch.tensor([[-1e4, -30.0, -0.0, 30.0, 1e4]])
    a, dh, dot = gelu.gelu_backward_rows(h, torch.ones_like(h), torch.ones(1))
    torch.testing.assert_close(a, h.relu())
    torch.testing.assert_close(dh, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    assert dot.item() == pytest.approx(1e4 + 30)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_dispatchers_gradients(dtype):
    """Gradients of a loss through gather and weigh, by kernels, against autograd through index_select and index_add in fp32."""
    x, _, index, gate = case(40, 25, 70, dtype)
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(5))

    def gradients(work):
        a, b = x.clone().requires_grad_(), gate.clone().requires_grad_()
        y = work(a, b)
        (y.float() * weight).sum().backward()
        return y.detach().float(), a.grad.float(), b.grad

    def kernels(a, b):
        made = TritonDispatcher()
        return made.weigh(made.gather(a, index) * 2, b, index, num_tokens=40)

    def plain(a, b):
        return torch.zeros(40, 70).index_add(0, index, a.float()[index] * 2 * b[:, None])

    for got, expected in zip(gradients(kernels), gradients(plain), strict=True):
        error = (got - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]


def test_kernels_stay_in_a_compiled_graph():
    """fullgraph: the ops are opaque to the compiler, and their shapes are known to it."""
    x, _, index, gate = case(40, 25, 16, torch.float32)
    made = TritonDispatcher()

    def layer(a, b):
        return made.weigh(gelu.gelu_rows(made.gather(a, index)), b, index, num_tokens=40).square().sum()

    found = []
    for work in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        b = gate.clone().requires_grad_()
        work(x, b).backward()
        found.append(b.grad)
    assert torch.equal(*found)
