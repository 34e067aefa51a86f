"""Norm and modulation, and whole blocks made of kernels, through Triton's interpreter
(test_kernels_interpreted.py runs this file)."""

from __future__ import annotations

import pytest
import torch

from ecdit_train.config.slots import RouterSizes
from ecdit_train.kernels import adaln, language
from ecdit_train.model.attention import Attention
from ecdit_train.model.block import Block
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.dispatchers.triton import TritonDispatcher
from ecdit_train.model.embed import Conditioning
from ecdit_train.model.experts.gelu import GeluExperts
from ecdit_train.model.moe import MoE
from ecdit_train.model.routers.expert_choice import ExpertChoice

BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SHAPES = [(1, 1, 1), (0, 3, 8), (2, 0, 8), (2, 17, 33), (1, 5, 1030), (3, 16, 64)]


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways(shape, dtype):
    """Against the twins in fp64 on the same rounded inputs. A width of 1 has no variance: everything but the shift vanishes."""
    (B, S, D), g = shape, torch.Generator().manual_seed(sum(shape))
    x = (2 * torch.randn(B, S, D, generator=g) + 1).to(dtype).requires_grad_()
    both = torch.randn(B, 3, D, generator=g).to(dtype)  # strided, as a block gives them
    shift, scale = (both[:, n].detach().requires_grad_() for n in (0, 1))
    dn, dh = (torch.randn(B, S, D, generator=g).to(dtype) for _ in range(2))
    normed, h = adaln.norm_modulate(x, shift_BD=shift, scale_BD=scale)
    alone = adaln.modulated_norm(x, shift_BD=shift, scale_BD=scale)
    assert torch.equal(alone, h)
    high = [t.detach().double().requires_grad_() for t in (x, shift, scale)]
    expected = adaln.norm_modulate(high[0], shift_BD=high[1], scale_BD=high[2])
    for got, want in zip((normed, h), expected, strict=True):
        assert got.dtype == dtype
        assert distance(got, want) < BOUND[dtype]
    for got, want, grad in (((normed, h), expected, (dn, dh)), ((alone,), expected[1:], (dh,))):
        mine = torch.autograd.grad(got, (x, shift, scale), grad, retain_graph=True)
        theirs = torch.autograd.grad(want, high, [z.double() for z in grad], retain_graph=True)
        for one, two in zip(mine, theirs, strict=True):
            assert one.dtype == dtype
            if D > 1:
                assert distance(one, two) < 2 * BOUND[dtype]
            else:
                torch.testing.assert_close(one.double(), two, rtol=BOUND[dtype], atol=BOUND[dtype])
    again = adaln.norm_modulate_backward(x, scale, dn, dh)
    assert all(torch.equal(a, b) for a, b in zip(again, adaln.norm_modulate_backward(x, scale, dn, dh), strict=True))


def test_what_is_not_for_kernels_goes_to_the_twin():
    x = torch.randn(1, 2, 8)
    shift = scale = torch.randn(1, 8)
    assert adaln.fuses(x, shift_BD=shift, scale_BD=scale)
    assert not adaln.fuses(x, shift_BD=shift.bfloat16(), scale_BD=scale)  # the result would have another type
    assert not adaln.fuses(torch.empty(1, 1, adaln.WIDEST + 1), shift_BD=shift, scale_BD=scale)
    wide = adaln.norm_modulate(x, shift_BD=shift.double(), scale_BD=scale.double())[1]
    assert wide.dtype == torch.float64


def block(dispatcher):
    torch.manual_seed(0)
    router = ExpertChoice(capacity_factor=2.0, sees="modulated").build(
        RouterSizes(width=32, num_experts=4, patch_values=4)
    )
    moe = MoE(router, GeluExperts(32, hidden=64, num_experts=4), dispatcher=dispatcher)
    attention = Attention(32, context_width=32, heads=2, kv_heads=1, head_dim=16)
    made = Block(32, self_attention=attention, cross_attention=None, feed_forward=moe, modulations=6)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def test_a_sparse_block_by_kernels_equals_one_without():
    """fp32 by kernels against fp64 by twins: values and every gradient."""
    by_kernels, plain = block(TritonDispatcher()), block(IndexAddDispatcher()).double()
    x, vector = torch.randn(2, 8, 32), torch.randn(2, 32)
    weight = torch.randn(2, 8, 32)
    found = []
    for made, dtype in ((by_kernels, torch.float32), (plain, torch.float64)):
        a = x.detach().to(dtype, copy=True).requires_grad_()
        c = Conditioning(
            text_BLY=None, text_mask_BL=None, vector_BD=vector.to(dtype), timestep_BD=vector.to(dtype), shared_B6D=None
        )
        y, _ = made(a, c, group_tokens=16)
        (y * weight.to(dtype)).sum().backward()
        found.append({"y": y.detach(), "x": a.grad} | {n: p.grad for n, p in made.named_parameters()})
    assert language.runs(x)
    for name, got in found[0].items():
        assert distance(got, found[1][name]) < 2e-5, name
