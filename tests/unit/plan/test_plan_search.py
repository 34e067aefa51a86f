"""The search against layouts drawn at random from everything that divides, and what it does with ties."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from ecdit_train.config.nearest import divisors
from ecdit_train.errors import ConfigError
from ecdit_train.plan import layout, parameters, search
from ecdit_train.plan.cost import cost

KEEPS = [
    [kind for n, kind in enumerate(("attention", "projections", "feed_forward", "experts")) if 1 << n & bits]
    for bits in range(16)
]


def drawn(draw: random.Random, cfg, world):
    """A configuration whose layout was drawn, not chosen; None where the rules refuse it."""
    pick, p = draw.choice, cfg.parallel
    mode = pick(["none", "selective", "full"])
    parallel = dataclasses.replace(
        p,
        tp=pick([1, 1, 1, 2]),
        ep=pick(divisors(cfg.moe.num_experts)),
        dp_replicate=pick([1, 1, 2]),
        dp_shard=-1,
        activation_checkpointing=mode,
        keep=tuple(pick(KEEPS)) if mode == "selective" else (),
        checkpoint_blocks=1.0 if mode == "none" else pick([0.25, 0.5, 0.75, 1.0]),
        overlap_chunks=pick([1, 2, 4]),
        exchange=pick(["flat", "hierarchical"]),
        reshard_after_forward=pick(["all", "dense", "experts", "none"]),
        reduce_gradients=pick(["step", "microbatch"]),
        replicate_experts=pick([False, True]),
    )
    train = dataclasses.replace(cfg.train, microbatch=pick([8, 16, 32, 64, 128, 256, 512]))
    cfg = dataclasses.replace(
        cfg, parallel=parallel, train=train, moe=dataclasses.replace(cfg.moe, form=pick(["plain", "lean"]))
    )
    try:
        return cfg, layout.resolve(cfg, world=world)
    except ConfigError:
        return None


@pytest.mark.parametrize(("name", "world"), [("ec_dit_xl_8e", 8), ("ec_dit_m_64e", 64), ("ec_dit_3xl_32e", 128)])
def test_no_drawn_layout_is_faster(cfg_of, name, world):
    cfg = cfg_of(name, f"cluster.nodes={world // 8}")
    counted, draw = parameters.count(cfg), random.Random(0)
    best = search.best(cfg, counted, world=world)
    fitting = 0
    for _ in range(300):
        if (found := drawn(draw, cfg, world)) is None:
            continue
        priced = cost(found[0], counted, found[1])
        if priced.memory.total <= search.HEADROOM * cfg.cluster.gpu_memory:
            fitting += 1
            assert priced.step_time.seconds >= best.step_time.seconds * (1 - search.TIE), found[1]
    assert fitting > 3


def test_nothing_is_computed_again_for_nothing(cfg_of):
    """With room for everything no block is checkpointed, and of what is as fast the plain form and fewest axes are taken."""
    for name, world in (("ec_dit_xl_8e", 8), ("ec_dit_m_64e", 64)):
        cfg = cfg_of(name, "cluster.gpu_memory=1e12")
        best = search.best(cfg, parameters.count(cfg), world=world)
        assert best.flops.recompute == 0
        assert best.layout.activation_checkpointing == "none"
        assert (best.layout.form, best.layout.tp, best.layout.dp_replicate) == ("plain", 1, 1)


def test_less_memory_is_bought_with_as_little_as_possible(cfg_of):
    """M-64E on ever smaller GPUs: ever slower, never fitting by less than it says, until nothing fits."""
    seconds = []
    for memory in (1.4e11, 6e10, 3e10):
        cfg = cfg_of("ec_dit_m_64e", f"cluster.gpu_memory={memory}")
        best = search.best(cfg, parameters.count(cfg), world=64)
        if best is None:
            seconds.append(float("inf"))
            continue
        assert best.memory.total <= search.HEADROOM * memory
        seconds.append(best.step_time.seconds)
    assert all(b >= a * (1 - search.TIE) for a, b in itertools.pairwise(seconds))
    assert seconds[-1] == float("inf")
    assert seconds[-2] < float("inf")


def test_words_lead_to_the_layout(cfg_of):
    for name, world in (("ec_dit_m_64e", 128), ("ec_dit_xl_8e", 16), ("race_b", 8)):
        cfg = cfg_of(name, f"cluster.nodes={world // 8}")
        best = search.best(cfg, parameters.count(cfg), world=world)
        again = cfg_of(name, f"cluster.nodes={world // 8}", *search.overrides(cfg, best.layout))
        assert layout.resolve(again, world=world) == best.layout
        assert search.overrides(again, best.layout) == ()


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("cluster.gpu_memory=1e30", "1e+13"),
        ("cluster.gpu_memory=8", "1e+08"),
        ("cluster.peak_flops=9.89e26", "1e+17"),
        ("cluster.memory_bandwidth=3e30", "1e+15"),
        ("cluster.intra_bandwidth=450", "1e+05"),
        ("cluster.inter_latency=4", "1.0"),
        ("cluster.call_latency=-1e-5", "0.0"),
    ],
)
def test_no_plan_for_a_machine_that_cannot_be(cfg_of, word, nearest):
    with pytest.raises(ConfigError) as refused:
        layout.resolve(cfg_of("ec_dit_xl_8e", word), world=8)
    (problem,) = refused.value.problems
    assert problem.field == word.partition("=")[0]
    assert problem.nearest == float(nearest)
