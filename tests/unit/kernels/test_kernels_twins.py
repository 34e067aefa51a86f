"""What runs where there is no GPU: the twins' gradients in fp64, the choice between kernel and twin, and that every kernel compiles
for the GPUs that training is planned for."""

from __future__ import annotations

import pytest
import torch

from ecdit_train.errors import ConfigError
from ecdit_train.kernels import adaln, draws, gelu, language, rows
from ecdit_train.model.dispatchers.triton import Triton


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    index = torch.tensor([4, 0, 0, 6, 0, 2, 6])
    x, y = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (8, 7))
    return (
        x.requires_grad_(),
        y.requires_grad_(),
        index,
        torch.rand(7, generator=g, dtype=torch.float64).requires_grad_(),
    )


def test_gradients_of_gather_sum_and_weigh(case):
    x, y, index, gate = case
    lists = rows.list_rows(index, num_tokens=8)
    assert torch.autograd.gradcheck(lambda a: rows.Gather.apply(a, index), (x,))
    assert torch.autograd.gradcheck(lambda a: rows.Gather.apply(a, index, lists), (x,))
    assert torch.autograd.gradcheck(lambda a: rows.Sum.apply(a, index, lists), (y,))
    assert torch.autograd.gradcheck(lambda a, b: rows.Weigh.apply(a, b, index, lists), (y, gate))


def test_gradients_of_gelu(case):
    _, h, _, gate = case
    da = torch.randn_like(h)
    gate = gate.detach().clone()
    gate[1] = 0.0
    a = torch.nn.functional.gelu(h, approximate="tanh")
    (expected,) = torch.autograd.grad(a, h, da)
    with torch.no_grad():
        got = gelu.gelu_backward_rows(h, da, gate)
    for one, two in zip(got, (a * gate[:, None], expected * gate[:, None], (a * da).sum(-1)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gelu_in_tiles_is_gelu_in_one(tile, dtype, monkeypatch):
    """To the rounding of a sigmoid, also where rows lie in two dims and not in order."""
    g = torch.Generator().manual_seed(0)
    h, da = (torch.randn(4, 3, 5, generator=g).to(dtype).transpose(0, 1) for _ in range(2))
    gate = torch.randn(4, 3, generator=g).to(dtype).transpose(0, 1)
    whole = gelu.gelu_backward_rows_twin(h.reshape(12, 5), da.reshape(12, 5), gate.reshape(12))
    monkeypatch.setattr(gelu, "TILE", tile)
    for got, expected in zip(gelu.gelu_backward_rows_twin(h, da, gate), whole, strict=True):
        rounding = 8 * torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got.flatten(0, 1), expected, rtol=rounding, atol=rounding)


def test_lists_name_every_row_once_in_order(case):
    _, _, index, _ = case
    lists = rows.list_rows(index, num_tokens=8)
    assert [lists.order_R[a:b].tolist() for a, b in zip(lists.start_N1, lists.start_N1[1:], strict=False)] == [
        [1, 2, 4], [], [5], [], [0], [], [3, 6], [],
    ]  # fmt: skip
    assert lists.num_tokens == 8


def test_cpu_tensors_and_fp64_go_to_the_twins():
    assert not language.runs(torch.zeros(1))
    assert not language.runs(torch.zeros(1, dtype=torch.float64))


def test_without_triton_the_dispatcher_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(language, "HERE", False)
    with pytest.raises(ConfigError, match=r"moe\.dispatcher = 'triton': needs Triton, .*nearest valid: deterministic"):
        Triton(cap=None).build()


def test_the_written_gradient_of_norm_and_modulation():
    """The twin of the backward kernel, in fp64, against autograd through the twin of the forward."""
    g = torch.Generator().manual_seed(0)
    x, dn, dh = (torch.randn(2, 5, 7, generator=g, dtype=torch.float64) for _ in range(3))
    shift, scale = (torch.randn(2, 7, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    x.requires_grad_()
    results = adaln.norm_modulate_twin(x, shift_BD=shift, scale_BD=scale)
    expected = torch.autograd.grad(results, (x, shift, scale), (dn, dh))
    for got, want in zip(adaln.norm_modulate_backward_twin(x, scale, dn, dh), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


SIGNATURES = {
    rows._gather_kernel: ("x:T index:i64 gate:f32 out:T", "D", {"GATED": True}),
    rows._sum_kernel: ("rows:T order:i64 start:i64 gate:f32 out:T", "D", {"GATED": True}),
    rows._gather_and_dot_kernel: ("grad:T rows:T index:i64 gate:f32 out:T dot:f32", "D", {}),
    gelu._gelu_kernel: ("h:T a:T", "size scale:f cube:f", {}),
    gelu._gelu_backward_kernel: ("h:T da:T gate:T a:T dh:T dot:f32", "H scale:f cube:f", {}),
    adaln._forward_kernel: ("x:T shift:T scale:T normed:T h:T", "S D eps:f", {"BOTH": True}),
    adaln._backward_kernel: (
        "x:T scale:T dnormed:T dh:T dx:T partial:f32", "S D apart eps:f", {"NORMED": True, "ROWS": 16},
    ),
    draws._draw_kernel: ("position:i64 first:i64 out:f32", "seed:l num", {"OFFSET": True, "NORMAL": True}),
}  # fmt: skip
"""Kernel -> its pointers (T: the type computed in), its numbers (32-bit integers but for f and l), its constants."""
NUMBERS = {"": "i32", "f": "fp32", "l": "i64"}


@pytest.mark.skipif(not language.HERE or language.INTERPRETED, reason="Triton is not installed, or interprets")
@pytest.mark.parametrize("kernel", SIGNATURES, ids=lambda k: getattr(k, "__name__", "kernel"))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_an_h100(kernel, dtype, tmp_path, monkeypatch):
    """To machine code, by Triton's own assembler, which needs no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    pointers, numbers, constants = SIGNATURES[kernel]
    constants = constants | {"SIZE" if kernel is draws._draw_kernel else "BLOCK": 1024}
    types = {"T": dtype, "i64": "i64", "f32": "fp32"}
    signature = {n: "*" + types[t] for n, t in (word.split(":") for word in pointers.split())}
    signature |= {n: NUMBERS[t] for n, _, t in (word.partition(":") for word in numbers.split())}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=constants)
    assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
