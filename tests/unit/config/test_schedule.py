"""A capacity factor that changes by stages: what a stage is, every rule asked of each, what a resume may change. And rules of
shared experts and of which blocks carry experts. The default is EC-DiT-XL-8E: groups of 1024, 512 while drawing."""

from __future__ import annotations

import json

import pytest
from test_validate import broken

from ecdit_train.config.compat import check_resume
from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.config.schedule import as_yaml
from ecdit_train.config.schema import sparse_layers
from ecdit_train.errors import ConfigError, RunFolderError

KEY = "moe.router.schedule"


def staged(base, *edges, **more):
    return with_values(base, {KEY: [list(edge) for edge in edges]} | {k.replace("__", "."): v for k, v in more.items()})


def test_stages(base):
    config = staged(base, (100, 1.0), (300, 0.5))
    assert broken(config) == []
    found = config.stages()
    assert [(first, c.capacity, c.moe.router.experts_per_token()) for first, c in found] == [
        (0, 256.0, 2.0),
        (100, 128.0, 1.0),
        (300, 64.0, 0.5),
    ]
    assert all(c.moe.router.schedule == () for _, c in found)
    router = config.moe.router
    assert [router.at(n).capacity_factor for n in (0, 99, 100, 299, 300, 10**6)] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]
    assert base.stages() == ((0, base),)
    assert compose(["moe=dense"], local=False).stages()[0][0] == 0


WRONG = [
    # Steps ascend inside the run.
    ([[300, 1.0], [100, 0.5]], [f"{KEY} = ((300, 1.0), (100, 0.5)): steps must ascend, from 1 to below train.steps = 800000; "
                                "nearest valid: [[100,0.5],[300,1.0]]"]),
    ([[0, 1.0]], [f"{KEY} = ((0, 1.0),): steps must ascend, from 1 to below train.steps = 800000; nearest valid: []"]),
    ([[5, 1.0], [5, 2.0]], [f"{KEY} = ((5, 1.0), (5, 2.0)): steps must ascend, from 1 to below train.steps = 800000; "
                            "nearest valid: [[5,2.0]]"]),
    ([[800000, 1.0]], [f"{KEY} = ((800000, 1.0),): steps must ascend, from 1 to below train.steps = 800000; nearest valid: []"]),
    # Factors are those of a router.
    ([[5, 9.0]], [f"{KEY} = ((5, 9.0),): factors must be greater than 0 and at most moe.num_experts = 8; "
                  "nearest valid: [[5,8.0]]"]),
    ([[5, 0.0]], [f"{KEY} = ((5, 0.0),): factors must be greater than 0 and at most moe.num_experts = 8; nearest valid: []"]),
    # Whole capacities in every stage, while drawing too.
    ([[5, 1.0], [9, 1.3]], [f"{KEY} = ((5, 1.0), (9, 1.3)): capacity from step 9 on = group * experts per token / experts = "
                            "1024 * 1.3 / 8 = 166.4 must be whole; nearest valid: [[5,1.0],[9,1.3125]]"]),
    ([[5, 0.0078125]], ["sample.scope = 'image': sampling capacity from step 5 on = group * experts per token / experts = "
                        "256 * 0.0078125 / 8 = 0.25 must be whole"]),
]  # fmt: skip


@pytest.mark.parametrize(("edges", "lines"), WRONG)
def test_refused_with_the_nearest_valid_schedule(base, edges, lines):
    found = broken(staged(base, *edges))
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start), line


@pytest.mark.parametrize("edges", [e for e, lines in WRONG if "nearest valid" in lines[0]])
def test_what_is_named_is_valid(base, edges):
    nearest = broken(staged(base, *edges))[0].rpartition("nearest valid: ")[2]
    assert broken(staged(base, *json.loads(nearest))) == []


def test_tp_divides_the_slots_of_every_stage(base):
    narrow = with_values(base, {"model.heads": 16, "model.kv_heads": 4, "model.width": 1024})
    assert broken(with_values(staged(narrow, (5, 1.0)), {"parallel.tp": 8})) == []
    # 1024 * 0.03125 / 8 = 4 slots in the second stage.
    few = with_values(staged(narrow, (5, 0.03125)), {"parallel.tp": 8})
    assert broken(few) == [
        "parallel.tp = 8: must divide the capacity = 4: each tp rank carries its share of an expert's slots; nearest valid: 4"
    ]


def test_the_sampling_group_fits_every_stage(base):
    group = {"sample__scope": "group", "sample__group_size": 512}
    assert broken(staged(base, (5, 1.0), **group)) == []
    assert broken(staged(base, (5, 0.0078125), **group)) == [
        "sample.group_size = 512: sampling capacity from step 5 on = group * experts per token / experts = 512 * 0.0078125 / 8 = "
        "0.5 must be whole; nearest valid: 1024"
    ]


def test_it_comes_from_yaml_and_the_command_line_as_lists():
    config = compose(["experiment=shapes_tiny", "moe.router.schedule=[[400,4.0],[800,2]]"], local=False)
    assert config.moe.router.schedule == ((400, 4.0), (800, 2.0))
    assert as_yaml(config.moe.router.schedule) == "[[400,4.0],[800,2.0]]"


def test_a_resume_may_change_it_when_asked(base):
    new = staged(base, (100, 1.0))
    with pytest.raises(RunFolderError, match=r"moe\.router\.schedule: \(\) -> \(\(100, 1\.0\),\) \(schedule\)"):
        check_resume(base, new)
    (change,) = check_resume(base, new, allow=[KEY])
    assert change.kind == "schedule"
    factor = with_values(base, {"moe.router.capacity_factor": 1.0})
    with pytest.raises(RunFolderError, match="another run"):
        check_resume(base, factor, allow=["moe.router.capacity_factor"])


# --- shared experts, and where experts are --------------------------------------------------------------------------------


def test_tp_divides_the_hidden_width_of_shared_experts(base):
    """1026 hidden channels: two ranks share them, four do not; two shared experts have 2052."""
    narrow = {"model.heads": 16, "model.kv_heads": 4, "model.width": 1024}
    odd = narrow | {"moe.expert_ratio": 1026 / 1024, "moe.shared_experts": 1}
    assert broken(with_values(base, odd | {"parallel.tp": 2})) == []
    assert broken(with_values(base, odd | {"parallel.tp": 4})) == [
        "parallel.tp = 4: must divide the hidden width of the shared experts = 1026; nearest valid: 2"
    ]
    assert broken(with_values(base, odd | {"moe.shared_experts": 2, "parallel.tp": 4})) == []
    assert broken(with_values(base, odd | {"moe.shared_experts": 0, "parallel.tp": 4})) == []


def test_blocks_with_experts(base):
    assert sparse_layers(7, which="even") == (2, 4, 6)
    assert sparse_layers(3, which="all") == (1, 2, 3)
    assert sparse_layers(6, which="after_3") == (4, 5, 6)
    assert broken(with_values(base, {"moe.layers": "after_3", "model.layers": 3})) == [
        "model.layers = 3: must be at least 4 with moe.layers = after_3: layers 4, 5, ... carry experts; nearest valid: 4"
    ]


def test_what_is_no_list_of_pairs_is_answered():
    def said(words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            compose([words], local=False)
        return str(caught.value.problems[0])

    assert said(f"{KEY}=[400,1.0]") == f"{KEY}[0] = 400: must be [a whole number, a number]"
    assert said(f"{KEY}=[[400,1.0,2]]") == f"{KEY}[0] = [400, 1.0, 2]: must be [a whole number, a number]"
    assert said(f"{KEY}=[[1.5,1.0]]") == f"{KEY}[0] = [1.5, 1.0]: must be [a whole number, a number]"
    assert said(f"{KEY}=3").startswith(f"{KEY} = 3: must be a list of [a whole number, a number]")
