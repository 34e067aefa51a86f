"""What a class that fills a slot must keep to, and what happens when it does not: said early, nothing lost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from moe_configs import moe_config
from tiny_runs import configure, live, records
from torch import nn

from ecdit_train.build import build_trainer
from ecdit_train.config.compat import kind
from ecdit_train.config.convert import with_values
from ecdit_train.config.schema import OptimConfig
from ecdit_train.config.slots import OptimizerConfig, SinkConfig
from ecdit_train.errors import ConfigError
from ecdit_train.model.init import initialise, persistent_buffers
from ecdit_train.model.moe import Experts
from ecdit_train.model.router import Router
from ecdit_train.observe.sinks import SinkContext, open_sinks
from ecdit_train.parallel.runtime import start
from ecdit_train.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Built(OptimizerConfig):
    how: str

    def build(self, params, *, lr, sharding):
        if self.how == "lazy":
            return torch.optim.SGD(params.values(), lr=lr, momentum=0.9)
        if self.how == "stateless":
            return torch.optim.SGD(params.values(), lr=lr)
        optimizer = torch.optim.SGD(params.values(), lr=lr)
        for p in params.values():
            optimizer.state[p] = {"row": torch.zeros(len(p))}
        return optimizer


def optim(how: str) -> OptimConfig:
    return OptimConfig(
        optimizer=Built(how=how), lr=0.1, warmup_steps=0, schedule="constant", clip_norm=0.0, ema_decay=0.0
    )


def test_state_of_another_shape_is_refused_before_the_first_step():
    with pytest.raises(ConfigError, match=r"keeps state \(row\) that is no tensor of its parameter's shape"):
        TrainState.fresh(nn.Linear(3, 2), optim("factored"))


def test_state_made_at_the_first_update_is_refused_after_it():
    model = nn.Linear(3, 2)
    state = TrainState.fresh(model, optim("lazy"))
    names = set(state.tensors())
    model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    with pytest.raises(ConfigError, match=r"made its state \(optim.momentum_buffer\) at the first update"):
        state.check_names(names)


def test_an_optimizer_without_state_can_be_resumed():
    state = TrainState.fresh(nn.Linear(3, 2), optim("stateless"))
    state.restore_step(7)
    assert state.step == 7
    state.check_names(set(state.tensors()))


class Counting(Router):
    def __init__(self):
        super().__init__()
        self.final = nn.Linear(4, 2)
        self.norm_gain = nn.Linear(2, 2, bias=False)
        self.gate = nn.Parameter(torch.empty(1))
        self.register_buffer("steps", torch.empty(()))
        self.register_buffer("scratch", torch.empty(3), persistent=False)

    constants = {"gate": 2.0, "norm_gain.weight": 0.5}  # noqa: RUF012

    def reset_buffers(self):
        self.steps.zero_()
        self.scratch.zero_()


def test_names_of_the_network_mean_nothing_in_a_slot():
    model = nn.ModuleDict({"router": Counting(), "final": nn.Linear(2, 2)})
    initialise(model, seed=0)
    assert model["router"].final.weight.any()
    assert not model["router"].final.bias.any()
    assert not model["final"].weight.any()
    assert (model["router"].gate == 2.0).all()
    assert (model["router"].norm_gain.weight == 0.5).all()
    assert [name for name, _ in persistent_buffers(model)] == ["router.steps"]


def test_buffers_without_first_values_are_refused():
    router = Counting()
    router.reset_buffers = Router.reset_buffers.__get__(router)
    with pytest.raises(NotImplementedError, match=r"Counting has buffers and must define reset_buffers"):
        initialise(nn.ModuleDict({"router": router}), seed=0)


class Nested(Experts):
    def __init__(self, experts: int, inner: Experts | None = None) -> None:
        super().__init__(experts)
        self.up = nn.Parameter(torch.empty(experts, 2), requires_grad=False)
        self.register_buffer("seen", torch.zeros(experts))
        self.inner = inner


def test_experts_shard_themselves_whole():
    experts = Nested(8, Nested(8))
    experts.shard(index=1, count=4)
    assert (experts.num_experts, experts.inner.num_experts) == (2, 2)
    assert {tuple(t.shape) for t in (*experts.parameters(), *experts.buffers())} == {(2, 2), (2,)}
    assert not experts.up.requires_grad, "frozen stays frozen"
    shared = Nested(8)
    shared.bias = nn.Parameter(torch.empty(3))
    with pytest.raises(
        TypeError, match=r"Nested.bias has shape \(3,\): what experts hold is stacked on dim 0 \(8 experts\)"
    ):
        shared.shard(index=0, count=2)


def test_a_router_hears_of_every_step_also_without_observing(tiny_shards, tmp_path, monkeypatch):
    from ecdit_train.model.routers.expert_choice import ExpertChoiceRouter

    heard = []
    monkeypatch.setattr(ExpertChoiceRouter, "update_buffers", lambda self, observed: heard.append(dict(observed)))
    live(configure(tmp_path, tiny_shards, "train.steps=4"))
    assert heard == [{}] * 4


@dataclass(frozen=True, kw_only=True)
class Bad(SinkConfig):
    when: str

    def open(self, run):
        if self.when == "open":
            raise ConnectionError("server_token=abc is down")
        return self

    def log(self, step, record):
        if self.when == "log":
            raise ConnectionError("down")

    def images(self, path, key, step, caption):
        raise ConnectionError("down")

    def close(self):
        raise ConnectionError("down")


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_sink_that_raises_is_switched_off_and_named_once(when, tmp_path, caplog):
    about = SinkContext(folder=tmp_path, name="n", config={}, resume_step=0)
    sinks = open_sinks(about, {"mine": Bad(when=when)}, rank=0)
    for step in (1, 2):
        sinks.log(step, {"train/loss": 1.0})
    sinks.close()
    assert [line["step"] for line in records(tmp_path)] == [1, 2]
    assert caplog.text.count("sink mine is off for this run: ConnectionError") == 1
    assert "abc" not in caplog.text


def test_a_start_from_a_run_with_another_router_keeps_first_buffers(tiny_shards, tmp_path):
    assert live(configure(tmp_path / "choice", tiny_shards, "train.steps=4")).finished
    words = ("moe=threshold", f"train.init_from={tmp_path}/choice", "train.steps=4")
    trainer = build_trainer(configure(tmp_path / "threshold", tiny_shards, *words), start("cpu"))
    trainer.close()
    assert trainer.parallel.model.blocks[1].feed_forward.router.threshold == pytest.approx(0.25)
    back = ("moe=expert_choice", f"train.init_from={tmp_path}/threshold", "train.steps=4")
    assert live(configure(tmp_path / "threshold", tiny_shards, *words)).finished
    assert live(configure(tmp_path / "back", tiny_shards, *back)).finished


def test_what_changes_the_result_is_identity():
    base = configure("unused", "unused")
    capped = with_values(base, {"moe.dispatcher.cap": 0.5})
    assert kind("moe.dispatcher.cap", old=base, new=capped) == "identity"
    fixed = replace(base, moe=moe_config(num_experts=4, capacity_factor=2.0, combine="deterministic", group_size=16))
    assert kind("moe.dispatcher._target_", old=base, new=fixed) == "free"

    @dataclass(frozen=True, kw_only=True)
    class Own(type(base.moe.dispatcher)):
        same_result = False

    own = replace(base, moe=replace(base.moe, dispatcher=Own(cap=None)))
    assert kind("moe.dispatcher._target_", old=base, new=own) == "identity"

    @dataclass(frozen=True, kw_only=True)
    class Whole(type(base.moe.router)):
        whole_batch = True

    whole = replace(base, moe=replace(base.moe, router=Whole(capacity_factor=2.0, sees="modulated")))
    assert kind("train.microbatch", old=base, new=base) == "free"
    assert kind("train.microbatch", old=whole, new=whole) == "identity"


def test_a_race_goes_on_among_as_many_images_as_it_began_with(tiny_shards, tmp_path):
    """Another number of ranks or another microbatch would silently be another selection."""
    race = ("moe=expert_race", "moe.num_experts=4", "moe.router.capacity_factor=1.0", "optim.warmup_steps=1")
    begun = configure(tmp_path / "race", tiny_shards, *race, "train.steps=2", "train.microbatch=4")
    live(begun)
    longer = replace(begun, train=replace(begun.train, steps=4))
    other = replace(longer, train=replace(longer.train, microbatch=8))
    with pytest.raises(
        ConfigError, match=r"train\.microbatch = 8: .*was 1 data-parallel ranks \* 4 images.*nearest valid: 4"
    ):
        live(other)
    assert live(longer).finished
    fixed = configure(
        tmp_path / "fixed", tiny_shards, *race, "moe.router.pool_images=8", "train.microbatch=8", "train.steps=2"
    )
    live(fixed)
    assert live(replace(fixed, train=replace(fixed.train, steps=4))).finished
