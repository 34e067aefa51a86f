"""The plan as a whole: verdict, refusals, suggestion, JSON and text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ecdit_train import plan
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError
from ecdit_train.plan import document, search

GPU_PRESETS = ("ec_dit_xl_8e", "ec_dit_xxl_32e", "ec_dit_3xl_32e", "ec_dit_m_64e", "dense_m", "gshard_xl_8e")


@pytest.fixture(scope="module")
def planned(cfg_of):
    cache = {}

    def get(*words, world=None):
        if (words, world) not in cache:
            cache[words, world] = plan.estimate(cfg_of(*words), world=world)
        return cache[words, world]

    return get


def test_every_documented_key_is_there_and_no_other(planned):
    keys = {
        line.strip().split("  ")[0] for line in document.__doc__.split("-----\n")[1].splitlines() if line[4:5].strip()
    }
    names = {name.strip() for key in keys for name in key.split(",")}
    tree = plan.to_json(planned("ec_dit_m_64e"))
    assert {name.split(".")[0] for name in names} == set(tree)
    for name in names:
        head, _, tail = name.partition(".")
        if tail and not tail.startswith("<"):
            assert tail in tree[head], name
    assert set(tree["traffic_per_step"]) == {*document.KINDS, "flows"}
    assert json.loads(json.dumps(tree)) == tree


def test_json_numbers(planned):
    tree = plan.to_json(planned("ec_dit_m_64e"))
    assert tree["parameters"]["total"] == pytest.approx(97.21e9, rel=0.005)
    assert tree["parameters"]["activated"] == pytest.approx(8.27e9, rel=0.01)
    assert tree["parameters"]["total"] == sum(tree["parameters"]["by_part"].values()) + tree["parameters"]["encoders"]
    memory = dict(tree["memory_per_rank"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()) - 2 * memory["never_together"])
    assert tree["flops_per_step"] == pytest.approx(sum(tree["flops"]["by_part"].values()))
    assert tree["checkpoint_bytes"] == 16 * tree["parameters"]["network"]
    assert tree["fits"] is True
    assert tree["min_nodes"] == 8
    assert tree["table1"]["row"] == "M-64E"
    assert tree["layout"]["ep"] == 32
    assert tree["layout"]["edp"] == 2


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_presets_fit_their_nodes(planned, name):
    p = planned(name)
    assert p.fits
    assert p.min_nodes is not None
    assert p.min_nodes <= p.cfg.cluster.nodes


def test_text_says_the_verdict_first(planned):
    wasteful = ("parallel.activation_checkpointing=full", "parallel.keep=[]")  # so that there is something to warn of
    lines = plan.render(planned("ec_dit_m_64e", *wasteful)).splitlines()
    assert lines[0].startswith("ec_dit_m_64e on 64 ranks, 8 nodes")
    assert lines[1].startswith("fits: yes, ")
    assert "of 80 GB" in lines[1]
    assert "MFU" in lines[1]
    text = "\n".join(lines)
    for heading in ("parameters", "layout", "memory per rank", "step", "traffic per rank and step", "warnings"):
        assert f"\n{heading}\n" in text
    assert "97.15B" in text
    assert "M-64E" in text
    assert max(map(len, lines)) <= 200


def test_a_run_that_does_not_fit_says_so_and_what_would(planned):
    p = planned("ec_dit_m_64e", "parallel=ep8", world=32)
    assert not p.fits
    text = plan.render(p)
    assert text.splitlines()[1].startswith("fits: NO, ")
    assert any(line.startswith("does not fit") for line in p.warnings)
    assert p.suggested is not None
    assert p.suggested.fits
    assert p.suggested.layout.ep > 1


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_suggestion_is_valid_faster_and_fits(planned, cfg_of, name):
    p = planned(name)
    if p.suggested is None:
        return
    assert p.suggested.fits
    assert p.suggested.step_time.seconds < p.cost.step_time.seconds
    words = search.overrides(cfg_of(name), p.suggested.layout)
    cfg = cfg_of(name, *words)
    validate(cfg, world=p.cost.layout.world)
    again = plan.estimate(cfg)
    assert again.cost.step_time.seconds == pytest.approx(p.suggested.step_time.seconds)
    assert again.suggested is None


def test_large_models_keep_experts_in_reach(planned):
    """M-64E by FSDP alone cannot work; its experts are spread over nodes, and matrices are not split."""
    best = planned("ec_dit_m_64e", "parallel=fsdp").suggested
    assert best.layout.ep in (32, 64)
    assert best.layout.tp == 1


@pytest.mark.parametrize(
    ("words", "world", "field", "nearest"),
    [
        (("ec_dit_m_64e", "parallel.ep=48"), 96, "parallel.ep", 32),
        (("ec_dit_xl_8e", "parallel.tp=4"), 8, "parallel.tp", 2),
        (("ec_dit_xl_8e",), 12, "parallel.ep", 4),
        (("ec_dit_xl_8e", "train.microbatch=24"), 8, "train.microbatch", None),
    ],
)
def test_refusals_name_the_nearest_value(cfg_of, words, world, field, nearest):
    with pytest.raises(ConfigError) as refused:
        plan.estimate(cfg_of(*words), world=world)
    problems = [p for p in refused.value.problems if p.field == field]
    assert problems
    assert problems[0].nearest is not None
    if nearest is not None:
        assert nearest in [p.nearest for p in problems]


def test_frozen_encoders_inside_training_are_named(planned):
    assert any("encoders=shards" in line for line in planned("ec_dit_xl_8e", "encoders=paper").warnings)
    assert not any("encoders=shards" in line for line in planned("ec_dit_xl_8e").warnings)


def test_97_billion_parameters_in_five_seconds_without_a_process_group():
    """CPU seconds of the whole process after its imports, and no torch.distributed group afterwards."""
    code = (
        "import time, torch, torch.distributed as dist\n"
        "from ecdit_train import plan\n"
        "from ecdit_train.config.compose import compose\n"
        "cfg = compose(['experiment=ec_dit_m_64e'], local=False)\n"
        "t = time.process_time(); plan.render(plan.estimate(cfg)); t = time.process_time() - t\n"
        "assert not dist.is_initialized()\n"
        # Not ru_maxrss: it starts at what the parent had when it forked.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(t, int(peak.split()[1]) / 1e6)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 5.0, f"{out[0]} CPU seconds"
    assert float(out[1]) < 2.0, f"{out[1]} GB"
