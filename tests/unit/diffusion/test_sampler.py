"""Sampling: guidance, what a picture depends on, prompts as keys."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from moe_configs import moe_config
from plain_configs import model_config
from torch import Tensor

from benchmarks.layers import fill_zeros
from ecdit_train import keyed
from ecdit_train.config.schema import SampleConfig
from ecdit_train.diffusion.encoders.hash_words import HashTextEncoder
from ecdit_train.diffusion.sampler import prompt_positions, sample
from ecdit_train.diffusion.samplers.euler import Euler
from ecdit_train.diffusion.samplers.heun import Heun
from ecdit_train.evaluate.pictures import sample_latents
from ecdit_train.keyed import Purpose
from ecdit_train.model.dit import DiT
from ecdit_train.model.init import initialise
from ecdit_train.parallel.compiling import apply_compile

SHAPE = (3, 8, 8)
PATCHES = 16
CONFIG = SampleConfig(sampler=Euler(), steps=4, guidance=2.5, scope="image", group_size=512, seed=11)
ENCODER = HashTextEncoder(width=32, max_tokens=6)


def make(*, router: str = "expert_choice") -> DiT:
    """A network whose zero-initialised parts are random, so that everything has an effect."""
    moe = moe_config(router, scope="image", group_size=PATCHES)
    dit = DiT(model_config(), moe, channels=SHAPE[0], text_features=ENCODER.width)
    initialise(dit, seed=0)
    fill_zeros(dit, std=0.1)
    return dit


def draw(model: DiT, prompts: list[str], *, images_per_group: int = 1, watch=None, **changes: object) -> Tensor:
    return sample_latents(
        model,
        features=ENCODER.encode(prompts),
        position_B=prompt_positions(prompts),
        shape=SHAPE,
        config=replace(CONFIG, **changes),
        prediction="velocity",
        group_tokens=images_per_group * PATCHES,
        watch=watch,
    )


def test_same_prompt_same_picture_whatever_else_is_in_the_batch():
    model = make()
    alone = draw(model, ["a red circle"])
    together = draw(model, ["two blue squares", "a red circle", "a green cross", "nothing"])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - alone[0]).abs().max() > 0.1
    assert torch.equal(alone, draw(model, ["a red circle"]))
    assert (draw(model, ["a red circle"], seed=12) - alone).abs().max() > 0.1


@pytest.mark.parametrize("sampler", [Euler(), Heun()], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_work_on_the_prompt_is_done_once_and_changes_no_bit(guidance, sampler):
    prompts, calls = ["a red circle", "two blue squares", "a red circle"], []
    model = make()
    for name in ("text", "pooled_text", "blocks.0.cross_attention.key", "blocks.1.cross_attention.value"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    once = draw(model, prompts, guidance=guidance, sampler=sampler)
    assert len(calls) == 4
    model.prompt = lambda text: text  # the plain form: the network is given the text in every step
    assert torch.equal(once, draw(model, prompts, guidance=guidance, sampler=sampler))
    assert len(calls) > 4 + 4 * 3


def test_compiled_blocks_draw_with_a_prompts_keys_and_values(monkeypatch):
    """The same pictures; another draw compiles nothing anew."""
    model = make()
    plain = draw(model, ["a red circle", "nothing"])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    apply_compile(model)
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    torch.testing.assert_close(draw(model, ["a red circle", "nothing"]), plain)
    graphs = counted["unique_graphs"]
    assert graphs > 0
    draw(model, ["two blue squares", "a green cross"])
    assert counted["unique_graphs"] == graphs


def test_in_a_pool_of_two_images_a_picture_depends_on_its_neighbour():
    model = make()
    one, other = (draw(model, ["a red circle", p], images_per_group=2) for p in ("two blue squares", "a green cross"))
    assert (one[0] - other[0]).abs().max() > 1e-3
    dense = make(router="dense")
    one, other = (draw(dense, ["a red circle", p], images_per_group=2) for p in ("two blue squares", "a green cross"))
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)


class Constant:
    """A network that says 3 where there is a caption and 1 where there is none, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def __call__(self, x_BCHW: Tensor, t: float, t_B: Tensor) -> Tensor:
        assert t_B.tolist() == [t] * len(x_BCHW)
        self.calls.append((len(x_BCHW), t))
        drop_B = torch.arange(len(x_BCHW)) >= 2
        return torch.where(drop_B, 1.0, 3.0)[:, None, None, None].expand(-1, *SHAPE)


def follow(network, *, prediction: str = "velocity", **changes: object) -> Tensor:
    return sample(
        network, position_B=torch.tensor([4, 5]), shape=SHAPE, config=replace(CONFIG, **changes), prediction=prediction
    )


@pytest.mark.parametrize(("guidance", "velocity", "batch"), [(1.0, 3.0, 2), (2.5, 1 + 2.5 * 2, 4), (0.0, 1.0, 4)])
def test_guidance_is_unconditional_plus_scale_times_difference(guidance, velocity, batch):
    noise = keyed.normal(CONFIG.seed, Purpose.SAMPLE_NOISE, torch.tensor([4, 5]), shape=SHAPE)
    network = Constant()
    torch.testing.assert_close(follow(network, guidance=guidance), noise + velocity)
    assert network.calls == [(batch, n / 4) for n in range(4)]


def test_heun_asks_twice_but_in_the_last_step():
    network = Constant()
    follow(network, sampler=Heun(), guidance=1.0)
    assert [t for _, t in network.calls] == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_the_watcher_sees_captioned_and_null_pictures_as_pools_of_their_own():
    seen = []
    draw(make(), ["a", "b"], watch=lambda t, out: seen.append((t, out.assignments[0].index_EGC.shape)))
    assert [t for t, _ in seen] == [0.0, 0.25, 0.5, 0.75]
    assert {shape for _, shape in seen} == {(4, 4, 4)}, "four experts, two pictures with and without caption, C = 4"


@pytest.mark.parametrize("sampler", [Euler(), Heun()], ids=str)
def test_a_perfect_data_prediction_draws_the_data(sampler):
    data = torch.linspace(-1, 1, 3 * 8 * 8).view(1, *SHAPE)
    drawn = follow(lambda x, t, t_B: data.expand_as(x), prediction="data", sampler=sampler)
    torch.testing.assert_close(drawn, data.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-5)


def test_prompt_keys_count_repetitions_of_a_prompt_only():
    a, b, a2, a3 = prompt_positions(["a", "b", "a", "a"]).tolist()
    assert (a, b) == tuple(prompt_positions(["a", "b"]).tolist())
    assert (a2, a3) == (a + 1, a + 2)
    assert len({a, b, a2, a3}) == 4


def test_no_gradient_is_kept():
    assert not draw(make(), ["a"]).requires_grad
