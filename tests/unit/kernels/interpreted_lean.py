"""The lean layer by kernels against the plain one in fp64, through Triton's interpreter (by test_kernels_interpreted.py)."""

from __future__ import annotations

import pytest
import torch
from moe_configs import moe_config
from plain_configs import model_config

from ecdit_train.model.dit import make_moe

MODEL = model_config(width=24, heads=1, patch=1, text_refiner_layers=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient(dtype):
    found = []
    weight = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(2))
    for combine, form, kind in (("triton", "lean", dtype), ("index_add", "plain", torch.float64)):
        made = make_moe(MODEL, moe_config(combine=combine, form=form, capacity_factor=2.0), patch_values=4)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_((torch.randn(p.shape, generator=g) * 0.3).to(dtype))
        made.to(kind)
        made.router.to(torch.promote_types(kind, torch.float32))
        x = torch.randn(4, 16, 24, generator=g).to(dtype).to(kind).requires_grad_()
        y, _ = made(x, group_tokens=32)
        (y * weight.to(kind)).sum().backward()
        found.append({"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in made.named_parameters()})
    for name, got in found[0].items():
        expected = found[1][name]
        error = float((got.double() - expected).norm() / expected.norm())
        assert error < (2e-6 if dtype == torch.float32 else 2e-2), f"{name}: {error}"
