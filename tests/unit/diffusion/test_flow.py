"""The path between noise and data, its velocity, the draws of a step and the loss."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from ecdit_train.config.schema import DiffusionConfig
from ecdit_train.diffusion.flow import TRAIN_FLOOR, Flow, as_velocity, interpolate
from ecdit_train.diffusion.samplers.euler import Euler
from ecdit_train.diffusion.samplers.heun import Heun
from ecdit_train.model.embed import patchify

CONFIG = DiffusionConfig(prediction="velocity", timestep_mean=-0.3, timestep_std=1.2, mask_ratio=0.5, caption_drop=0.1)
FLOW = Flow(config=CONFIG, seed=5, patch=2, num_kept=8)
SHAPE = (3, 8, 8)


def integrate(velocity, x, *, steps, method):
    sampler = {"euler": Euler(), "heun": Heun()}[method]
    return sampler.integrate(velocity, x, times=sampler.times(steps))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_t_0_is_noise_and_t_1_is_data_and_velocity_is_the_derivative():
    x, eps = random(4, 3, 2, 2), random(4, 3, 2, 2, seed=1)
    assert torch.equal(interpolate(x, eps, torch.zeros(4)), eps)
    assert torch.equal(interpolate(x, eps, torch.ones(4)), x)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    slope = (interpolate(x, eps, t + 1e-6) - interpolate(x, eps, t - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, x - eps, rtol=1e-7, atol=1e-8)


def test_data_and_velocity_predictions_are_one_statement():
    x, eps, t = random(4, 3, 2, 2), random(4, 3, 2, 2, seed=1), torch.tensor([0.0, 0.3, 0.6, 0.94], dtype=torch.float64)
    x_t = interpolate(x, eps, t)
    torch.testing.assert_close(as_velocity(x, x_t, t, prediction="data", floor=TRAIN_FLOOR), x - eps)
    assert as_velocity(x, x_t, t, prediction="velocity", floor=TRAIN_FLOOR) is x
    late = torch.full((4,), 0.999, dtype=torch.float64)
    bounded = as_velocity(x, torch.zeros_like(x), late, prediction="data", floor=TRAIN_FLOOR)
    torch.testing.assert_close(bounded, x / TRAIN_FLOOR)


def test_both_predictions_minimise_one_loss():
    x, eps = random(4, *SHAPE).float(), random(4, *SHAPE, seed=1).float()
    guess, t = random(4, *SHAPE, seed=2).float(), torch.tensor([0.1, 0.4, 0.7, 0.9])
    velocity = as_velocity(guess, interpolate(x, eps, t), t, prediction="data", floor=TRAIN_FLOOR)
    by_data = dataclasses.replace(FLOW, config=dataclasses.replace(CONFIG, prediction="data"))
    patches = {"x_BKP": patchify(x, patch=2), "eps_BKP": patchify(eps, patch=2), "t_B": t}
    torch.testing.assert_close(
        by_data.loss(patchify(guess, patch=2), **patches), FLOW.loss(patchify(velocity, patch=2), **patches)
    )
    assert FLOW.loss(patchify(x - eps, patch=2), **patches) < 1e-12
    assert by_data.loss(patches["x_BKP"], **patches) == 0
    mean = FLOW.loss(torch.zeros_like(patches["x_BKP"]), **patches)
    torch.testing.assert_close(mean, (x - eps).square().mean())


def test_loss_is_fp32_whatever_the_network_computes_in():
    x = random(2, 8, 12).float()
    assert FLOW.loss(x.bfloat16(), x_BKP=x, eps_BKP=x, t_B=torch.full((2,), 0.5)).dtype == torch.float32


def test_timesteps_are_logit_normal():
    t = FLOW.draw(torch.arange(20000), shape=(1, 8, 4)).t_B
    u = torch.logit(t.double())
    assert abs(u.mean() + 0.3) < 4 * 1.2 / math.sqrt(20000)
    assert abs(u.std() - 1.2) < 0.03
    assert 0 < t.min() < t.max() < 1


def test_draws_are_functions_of_the_position():
    p = torch.tensor([3, 2**35, 11])
    whole, one = FLOW.draw(p, shape=SHAPE), FLOW.draw(p[1:2], shape=SHAPE)
    for field in ("eps_BCHW", "t_B", "keep_BK", "drop_B"):
        assert torch.equal(getattr(whole, field)[1:2], getattr(one, field))
    assert whole.eps_BCHW.shape == (3, *SHAPE)
    assert whole.keep_BK.shape == (3, 8)
    assert not torch.equal(whole.keep_BK[0], whole.keep_BK[1])
    other = dataclasses.replace(FLOW, seed=6).draw(p, shape=SHAPE)
    assert not torch.equal(other.t_B, whole.t_B)


def test_captions_are_dropped_as_often_as_configured():
    drop = FLOW.draw(torch.arange(20000), shape=(1, 8, 4)).drop_B
    assert abs(drop.double().mean() - 0.1) < 0.01
    for share in (0.0, 1.0):
        flow = dataclasses.replace(FLOW, config=dataclasses.replace(CONFIG, caption_drop=share))
        assert (flow.draw(torch.arange(500), shape=(1, 8, 4)).drop_B == bool(share)).all()


def test_nothing_is_masked_at_ratio_zero():
    flow = dataclasses.replace(FLOW, num_kept=16)
    assert flow.draw(torch.arange(4), shape=SHAPE).keep_BK is None


# --- a field whose solution is known: data ~ N(m, s^2) -------------------------------------------------------------

MEAN, STD = 1.5, 0.4


def marginal_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[data - noise | x_t = x]; its flow carries noise z to m + s z."""
    variance = t * t * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def denoiser(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[data | x_t = x]."""
    variance = t * t * STD**2 + (1 - t) ** 2
    return MEAN + t * STD**2 / variance * (x - t * MEAN)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_noise_becomes_data_at_the_order_of_the_method(method, order):
    z = random(64)
    errors = [
        (integrate(marginal_velocity, z, steps=n, method=method) - (MEAN + STD * z)).abs().max() for n in (64, 128, 256)
    ]
    for coarse, fine in pairwise(errors):
        assert abs(torch.log2(coarse / fine) - order) < 0.15
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_data_prediction_follows_the_same_path(method):
    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        t_B = torch.full((len(x),), t, dtype=x.dtype)
        return as_velocity(denoiser(x, t), x, t_B, prediction="data", floor=1e-3)

    z = random(64)
    torch.testing.assert_close(
        integrate(velocity, z, steps=20, method=method),
        integrate(marginal_velocity, z, steps=20, method=method),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_single_point_is_reached_exactly(method):
    """Data that is one point: straight paths, so that any number of steps arrives, and t = 1 is never asked for."""
    seen = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return (2.0 - x) / (1.0 - t)

    torch.testing.assert_close(
        integrate(velocity, random(5), steps=3, method=method), torch.full((5,), 2.0, dtype=torch.float64)
    )
    assert max(seen) < 1.0
    assert len(seen) == (3 if method == "euler" else 5)
