"""The schedule, the optimizers against plain lines, and the moving average."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn

from ecdit_train.config.compose import compose
from ecdit_train.train.optim import Ema, learning_rate
from ecdit_train.train.optimizers.adamw import AdamW
from ecdit_train.train.optimizers.rmsprop import RMSProp

KINDS = {
    "rmsprop": RMSProp(momentum=0.9, decay=0.99, eps=1e-8, weight_decay=0.0),
    "adamw": AdamW(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0),
}


def named(params):
    return {str(i): p for i, p in enumerate(params)}


@pytest.fixture(scope="module")
def optim():
    return replace(compose([], local=False).optim, lr=1.0, warmup_steps=4, schedule="constant")


def test_warmup_is_linear_and_starts_above_zero(optim):
    assert [learning_rate(s, optim, total_steps=10) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_no_warmup(optim):
    assert learning_rate(0, replace(optim, warmup_steps=0), total_steps=10) == 1.0


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("cosine", 0.5), ("linear", 0.5)])
def test_decay_reaches_zero_at_the_end_and_stays(optim, schedule, middle):
    optim = replace(optim, schedule=schedule)
    rate = [learning_rate(s, optim, total_steps=12) for s in (4, 8, 12, 20)]
    end = 1.0 if schedule == "constant" else 0.0
    assert rate == pytest.approx([1.0, middle, end, end], abs=1e-15)


@pytest.mark.parametrize(("shape", "falls"), [("linear", [1.0, 0.8, 0.6, 0.4]), ("sqrt", [1.0, 0.6, 0.434, 0.307])])
def test_warm_up_stable_decay(optim, shape, falls):
    """The stable phase does not depend on how long the run is; the decay is its last steps, down to the floor."""
    optim = replace(optim, schedule="wsd", decay_steps=4, decay_shape=shape, decay_floor=0.2)
    rate = [learning_rate(s, optim, total_steps=12) for s in range(13)]
    assert rate[:9] == [0.25, 0.5, 0.75, *[1.0] * 6]
    assert rate[8:12] == pytest.approx(falls, abs=1e-3)
    assert rate[12] == pytest.approx(0.2)
    longer = [learning_rate(s, optim, total_steps=40) for s in range(41)]
    assert longer[:9] == rate[:9]
    assert longer[8:37] == [1.0] * 29
    assert longer[36:] == rate[8:]


def test_warmup_as_long_as_the_run_divides_by_nothing(optim):
    assert learning_rate(10, replace(optim, warmup_steps=10, schedule="cosine"), total_steps=10) == 1.0


def _descend(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_with_momentum_in_plain_lines(momentum):
    """s <- decay s + (1 - decay) g^2; buffer <- momentum buffer + g / (sqrt(s) + eps); p <- p - lr buffer."""
    c = RMSProp(decay=0.95, momentum=momentum, eps=1e-8, weight_decay=0.0)
    gen = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=gen, dtype=torch.float64), torch.randn(5, generator=gen, dtype=torch.float64)]
    grads = [[torch.randn(p.shape, generator=gen, dtype=torch.float64) for p in start] for _ in range(7)]
    params = [nn.Parameter(p.clone()) for p in start]
    _descend(c.build(named(params), lr=0.01), params, grads)
    for i, p in enumerate(start):
        square, buffer = torch.zeros_like(p), torch.zeros_like(p)
        for step in grads:
            square = c.decay * square + (1 - c.decay) * step[i] ** 2
            buffer = momentum * buffer + step[i] / (square.sqrt() + c.eps)
            p = p - 0.01 * buffer
        torch.testing.assert_close(params[i].data, p, rtol=1e-12, atol=1e-14)


def test_average_forgets_its_youth_faster():
    p = nn.Parameter(torch.zeros(1))
    ema, expected = Ema({"p": p}, decay=0.9), 0.0
    for step in range(200):
        p.data.fill_(float(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.shadow["p"].item() == pytest.approx(expected, rel=1e-5)


def test_after_the_first_update_nine_tenths_are_the_new_weights():
    p = nn.Parameter(torch.zeros(1))
    ema = Ema({"p": p}, decay=0.999)
    p.data.fill_(1.0)
    ema.update(0)
    assert ema.shadow["p"].item() == pytest.approx(0.9)


def test_average_swaps_bitwise():
    gen = torch.Generator().manual_seed(2)
    params = {name: nn.Parameter(torch.randn(4, generator=gen)) for name in "ab"}
    ema = Ema(params, decay=0.99)
    for p in params.values():
        p.data.add_(1e-3)
    raw, average = {n: p.detach().clone() for n, p in params.items()}, {n: s.clone() for n, s in ema.shadow.items()}
    with suppress(KeyError), ema.swapped_in():
        assert all(torch.equal(params[n], average[n]) and torch.equal(ema.shadow[n], raw[n]) for n in params)
        raise KeyError
    assert all(torch.equal(params[n], raw[n]) and torch.equal(ema.shadow[n], average[n]) for n in params)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_decoupled_and_spares_vectors(kind):
    """With no gradient, a matrix shrinks by 1 - lr wd in a step and a vector stays."""
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = replace(KINDS[kind], weight_decay=0.5).build(named([matrix, vector]), lr=0.1)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(vector.detach(), torch.ones(2))
