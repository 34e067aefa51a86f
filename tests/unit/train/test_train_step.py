"""One step: microbatches, clipping, and a step that is not taken."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_runs import ROUTERS, configure, live
from torch import nn

from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import Microbatch, split
from ecdit_train.model.dit import DiT
from ecdit_train.model.init import initialise
from ecdit_train.train.device_guard import DeviceGuard
from ecdit_train.train.optimizers.adamw import AdamW
from ecdit_train.train.optimizers.rmsprop import RMSProp
from ecdit_train.train.state import TrainState, parameter_of
from ecdit_train.train.step import forward_backward, train_step


@dataclass
class Alone:
    """A ParallelContext of one process, in plain torch."""

    model: nn.Module

    def accumulate(self, *, last):
        return nullcontext()

    def clip(self, *, max_norm):
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm or float("inf"))

    def reduce(self, vector, *, op):
        return vector

    def mean_of_first(self, vector):
        return vector

    def any_rank(self, flags):
        return flags


def make(router: str, *extra: str):
    config = configure("unused", "unused", "model.text_refiner_layers=0", *ROUTERS[router], *extra)
    model = DiT(config.model, config.moe, channels=3, text_features=32)
    initialise(model, seed=0)
    flow = Flow(config=config.diffusion, seed=0, patch=config.model.patch, num_kept=config.tokens_per_image)
    return config, model, flow


def batch(n: int = 8, *, dtype: torch.dtype = torch.float32) -> Microbatch:
    gen = torch.Generator().manual_seed(5)
    return Microbatch(
        position_B=torch.arange(n) + 100,
        latents_BCHW=torch.randn(n, 3, 16, 16, generator=gen).to(dtype),
        features_BLX=torch.randn(n, 8, 32, generator=gen).to(dtype),
        mask_BL=torch.arange(8)[None, :] < torch.randint(1, 9, (n, 1), generator=gen),
    )


def take(config, model, flow, micros, state, *, lr=0.01):
    return train_step(micros, parallel=Alone(model), state=state, guard=DeviceGuard(config.health), lr=lr,
                      max_norm=config.optim.clip_norm, flow=flow, group_tokens=config.group_tokens).numbers()  # fmt: skip


def test_split_keeps_order_and_loses_nothing():
    parts = list(split(batch(8), size=2))
    assert [p.position_B.tolist() for p in parts] == [[100, 101], [102, 103], [104, 105], [106, 107]]
    assert torch.equal(torch.cat([p.latents_BCHW for p in parts]), batch(8).latents_BCHW)
    assert torch.equal(torch.cat([p.features_BLX for p in parts]), batch(8).features_BLX)
    assert torch.equal(torch.cat([p.mask_BL for p in parts]), batch(8).mask_BL)


def test_samples_without_a_caption_are_trained_on_as_if_it_were_dropped():
    """In each microbatch: loss and every gradient are those of a run that drops all captions; what stands in their
    text counts for nothing."""
    config, model, flow = make("expert_choice", "diffusion.caption_drop=0.0")
    state = TrainState.fresh(model, config.optim)
    for _ in range(4):  # modulation and output start at zero and hide the text
        take(config, model, flow, [batch()], state)
    dropping = replace(flow, config=replace(flow.config, caption_drop=1.0))
    none = torch.zeros(8, dtype=torch.bool)
    poisoned = replace(batch(), features_BLX=torch.full((8, 8, 32), 1e6), captioned_B=none)

    def grads(data, flow):
        model.zero_grad(set_to_none=True)
        done = forward_backward(
            model, list(split(data, size=4)), flow=flow, group_tokens=config.group_tokens, parallel=Alone(model)
        )
        return [*done.losses, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want = grads(batch(), dropping)
    for data in (replace(batch(), captioned_B=none), poisoned):
        assert all(torch.equal(a, b) for a, b in zip(want, grads(data, flow), strict=True))
    some = grads(replace(batch(), captioned_B=torch.arange(8) % 2 == 0), flow)
    assert not torch.equal(some[0], want[0])
    assert not torch.equal(some[0], grads(batch(), flow)[0])


@pytest.mark.parametrize("router", sorted(ROUTERS.keys() - {"expert_race"}))  # a race is over one forward pass
@pytest.mark.parametrize("size", [2, 4])
def test_microbatches_add_up_to_one_big_batch(router, size):
    """Whole routing groups (2 images) in each: the same gradient, to fp64's precision."""
    config, model, flow = make(router)
    model.double()
    data = replace(batch(), latents_BCHW=batch(dtype=torch.float64).latents_BCHW,
                   features_BLX=batch(dtype=torch.float64).features_BLX)  # fmt: skip
    grads, losses = [], []
    for micros in ([data], list(split(data, size=size))):
        model.zero_grad(set_to_none=True)
        done = forward_backward(model, micros, flow=flow, group_tokens=config.group_tokens, parallel=Alone(model))
        losses.append([float(torch.stack(v).mean()) for v in (done.losses, *done.auxiliary.values())])
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)  # the loss itself is fp32
    assert grads[0].keys() == grads[1].keys()
    scale = max(float(g.abs().max()) for g in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=2e-5, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_parameter_gets_a_gradient(router):
    config, model, flow = make(router, "diffusion.caption_drop=0.5")
    # Modulation and output start at zero and hide what is behind them: look after some steps.
    state = TrainState.fresh(model, config.optim)
    for _ in range(4):
        take(config, model, flow, [batch()], state)
    forward_backward(model, [batch()], flow=flow, group_tokens=config.group_tokens, parallel=Alone(model))
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("poison", ["latents", "weight", "inf"])
def test_a_step_that_is_not_finite_is_not_taken(poison):
    config, model, flow = make("expert_choice")
    state = TrainState.fresh(model, config.optim)
    take(config, model, flow, [batch()], state)
    data = batch()
    if poison == "latents":
        data.latents_BCHW[3, 0, 0, 0] = float("nan")
    elif poison == "inf":
        data.latents_BCHW[:] = float("inf")
    else:
        model.final.weight.data[0, 0] = float("nan")
    before = {name: t.clone() for name, t in state.tensors().items()}
    steps = [float(s["step"]) for s in state.optimizer.state.values()]
    numbers = take(config, model, flow, list(split(data, size=4)), state)
    assert not numbers.applied
    assert not numbers.finite
    state.restore_step(1)
    assert all(torch.equal(t, before[n]) or (t.isnan() == before[n].isnan()).all() for n, t in state.tensors().items())
    assert [float(s["step"]) for s in state.optimizer.state.values()] == steps


def test_clipping_limits_the_norm_and_reports_the_one_before():
    config, model, flow = make("dense")
    seen = []

    class Watching(Alone):
        def clip(self, *, max_norm):
            norm = super().clip(max_norm=max_norm)
            seen.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))
            return norm

    state = TrainState.fresh(model, config.optim)
    result = train_step([batch()], parallel=Watching(model), state=state, guard=DeviceGuard(config.health), lr=0.0,
                        max_norm=0.01, flow=flow, group_tokens=32).numbers()  # fmt: skip
    assert result.grad_norm > 0.01
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def test_the_rate_is_the_one_that_is_asked_for():
    config, model, flow = make("dense", "optim.optimizer.weight_decay=0")
    state = TrainState.fresh(model, config.optim)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    take(config, model, flow, [batch()], state, lr=0.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    take(config, model, flow, [batch()], state, lr=1e-3)
    assert not torch.equal(model.final.weight, before["final.weight"])


@pytest.mark.parametrize("router", ROUTERS)
def test_auxiliary_losses_go_by_name(router):
    config, model, flow = make(router)
    result = take(config, model, flow, [batch()], TrainState.fresh(model, config.optim))
    own = {"token_choice": ["balance"], "expert_race": ["similarity", "layer_target"], "diffmoe": ["predictor"]}
    assert list(result.auxiliary) == own.get(router, [])


OPTIMIZERS = {
    "rmsprop": RMSProp(momentum=0.9, decay=0.99, eps=1e-8, weight_decay=0.0),
    "adamw": AdamW(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0),
}


@pytest.mark.parametrize("decay", [0.0, 0.99])
@pytest.mark.parametrize(("kind", "slots"), [("rmsprop", 2), ("adamw", 2)])
def test_state_names_every_tensor(kind, slots, decay):
    config, model, _ = make("dense")
    state = TrainState.fresh(model, replace(config.optim, optimizer=OPTIMIZERS[kind], ema_decay=decay))
    tensors, params = state.tensors(), dict(model.named_parameters())
    assert len(tensors) == len(params) * (1 + slots + (decay > 0))
    assert {parameter_of(name) for name in tensors} == set(params)
    assert all(t.shape == params[parameter_of(name)].shape for name, t in tensors.items())
    assert not any(t.requires_grad for t in tensors.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping_of_the_real_spread_agrees_with_torch(precision, tiny_shards, tmp_path):
    """Through the composition root, on one process: the norm that is logged is torch's own."""
    norms = []

    def meddle(trainer):
        clip = type(trainer.parallel).clip

        def watched(self, *, max_norm):
            grads = [p.grad for p in trainer.state.params.values()]
            grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
            expected = float(torch.stack([g.float().norm() for g in grads]).norm())
            norms.append((expected, float(clip(self, max_norm=max_norm))))
            return torch.tensor(norms[-1][1])

        watching = type("Watched", (type(trainer.parallel),), {"clip": watched})
        object.__setattr__(trainer.parallel, "__class__", watching)

    live(configure(tmp_path, tiny_shards, f"train.precision={precision}", "train.steps=4"), before=meddle)
    assert len(norms) == 4
    assert all(ours == pytest.approx(theirs, rel=1e-5) for theirs, ours in norms)
