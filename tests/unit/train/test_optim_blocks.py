"""Optimizers block by block: torch's own bits, whatever the block's size; and a refused update changes none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ecdit_train.train.optim import Ema
from ecdit_train.train.optimizers import blocks, matrices_and_vectors
from ecdit_train.train.optimizers.adamw import AdamW, FusedAdamW
from ecdit_train.train.optimizers.rmsprop import RMSProp

SHAPES = ((33, 17), (7,), (1,), (40, 60), (5, 3, 9), (0, 4), (129,))
WD, LR, DECAY = 0.1, 0.01, 0.999
RMS = RMSProp(momentum=0.9, decay=0.99, eps=1e-8, weight_decay=WD)
ADAM = AdamW(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=WD)


class TorchRMSProp(torch.optim.RMSprop):
    """With decay as AdamW has it, for all matrices, of which some may have no gradient."""

    @torch.no_grad()
    def step(self):
        matrices = [p for group in self.param_groups for p in group["params"] if p.dim() > 1]
        torch._foreach_mul_(matrices, 1.0 - LR * WD)
        super().step()


def torchs(config, params):
    if isinstance(config, RMSProp):
        about = {"alpha": config.decay, "eps": config.eps, "momentum": config.momentum, "foreach": True}
        return TorchRMSProp(params, lr=LR, **about)
    groups = matrices_and_vectors({str(n): p for n, p in enumerate(params)}, weight_decay=WD)
    return torch.optim.AdamW(groups, lr=LR, betas=(config.beta1, config.beta2), eps=config.eps, foreach=True)


def made(dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=gen, dtype=dtype)) for shape in SHAPES]
    params[3].data = params[3].data.t().contiguous().t()  # lies in columns
    return params


def grads_for(params, *, seed, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    for n, p in enumerate(params):
        g = torch.randn(p.shape, generator=gen, dtype=p.dtype) * scale
        p.grad = None if n == 4 and seed % 2 else g


def held(optimizer, params, ema):
    return [
        *(p.detach() for p in params),
        *(v for p in params for v in optimizer.state[p].values()),
        *ema.shadow.values(),
    ]


@pytest.mark.parametrize("elements", [64, 1000, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", [RMS, replace(RMS, momentum=0.0), ADAM], ids=["rmsprop", "no momentum", "adamw"])
def test_they_are_torchs_to_the_last_bit(config, dtype, elements, monkeypatch):
    monkeypatch.setitem(blocks.ELEMENTS, "cpu", elements)
    ours, theirs = made(dtype), made(dtype)
    named = {str(n): p for n, p in enumerate(ours)}
    mine, reference = config.build(named, lr=LR), torchs(config, theirs)
    ema, plain = Ema(named, decay=DECAY), Ema({str(n): p for n, p in enumerate(theirs)}, decay=DECAY)
    mine.found_inf = torch.zeros(())
    for step in range(6):
        for params in (ours, theirs):
            grads_for(params, seed=step)
        mine.average = ema.beside(step)
        mine.step()
        reference.step()
        plain.update(step)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert mine.state[a].keys() == reference.state[b].keys()
        assert all(torch.equal(mine.state[a][name], reference.state[b][name]) for name in mine.state[a])
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow.values(), plain.shadow.values(), strict=True))


def build(kind, named):
    if kind == "fused":
        return FusedAdamW(ADAM, matrices_and_vectors(named, weight_decay=WD), lr=LR)
    return (RMS if kind == "rmsprop" else ADAM).build(named, lr=LR)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("kind", ["rmsprop", "adamw", "fused"])
def test_a_refused_update_changes_no_bit(kind, poison):
    """Of weights, state and average; -0.0 stays -0.0. What comes next is as if the refused step had not been."""
    runs = []
    for refused in (True, False):
        params = made()
        params[0].data[0] = -0.0
        named = {str(n): p for n, p in enumerate(params)}
        optimizer, ema = build(kind, named), Ema(named, decay=DECAY)

        def update(step, refuse, optimizer=optimizer, ema=ema):
            optimizer.found_inf = torch.tensor(refuse)
            if kind != "fused":
                optimizer.average = ema.beside(step)
            optimizer.step()
            if kind == "fused":
                ema.update(step, refuse=optimizer.found_inf)

        grads_for(params, seed=0)
        update(0, 0.0)
        if refused:
            counts = [optimizer.state[p]["step"].clone() for p in params]
            before = [t.clone() for t in held(optimizer, params, ema)]
            grads_for(params, seed=2, scale=poison)
            update(1, 1.0)
            for p, count in zip(params, counts, strict=True):
                optimizer.state[p]["step"].copy_(count)  # the host's, `TrainState.restore_step`
            after = held(optimizer, params, ema)
            bits = [[t.detach().contiguous().view(torch.int32) for t in some] for some in (before, after)]
            assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))
        grads_for(params, seed=4)
        update(1, 0.0)
        runs.append([t.clone() for t in held(optimizer, params, ema)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], before[0]), "an update that is made changes something"
