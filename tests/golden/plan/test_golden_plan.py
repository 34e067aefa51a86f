"""The plan of every shipped preset, in rounded key numbers: one short JSON file each.

`--update-golden` (or GOLDEN_UPDATE=1) rewrites them; the diff shows what a change costs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ecdit_train import plan
from ecdit_train.config.compose import compose, conf_folder

HERE = Path(__file__).parent
PRESETS = sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml"))


def rounded(value):
    """Four significant digits, integers where nothing is lost."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def _word(value):
    return "+".join(value) or "nothing" if isinstance(value, list) else value


def key_numbers(tree):
    time, memory, traffic = tree["step_time"], tree["memory_per_rank"], tree["traffic_per_step"]
    suggestion = tree["suggested_layout"]
    return rounded(
        {
            "world": tree["world"],
            "layout": " ".join(f"{key}={_word(value)}" for key, value in tree["layout"].items()),
            "parameters": {k: tree["parameters"][k] for k in ("total", "activated", "network", "encoders")},
            "flops_per_step": tree["flops_per_step"],
            "fits": tree["fits"],
            "min_nodes": tree["min_nodes"],
            "memory_gb": {k: v / 1e9 for k, v in memory.items()},
            "message_gb": {k: v["message"] / 1e9 for k, v in traffic.items() if k != "flows"},
            "inter_node_gb": sum(v["inter_node"] for k, v in traffic.items() if k != "flows") / 1e9,
            "seconds": time["seconds"],
            "mfu": time["mfu"],
            "mfu_ceiling": time["mfu_ceiling"],
            "checkpoint_gb": tree["checkpoint_bytes"] / 1e9,
            "suggested": suggestion and " ".join(suggestion["overrides"]),
            "suggested_seconds": suggestion and suggestion["seconds"],
        }
    )


@pytest.mark.parametrize("name", PRESETS)
def test_plan_of_preset(request, name):
    cfg = compose([f"experiment={name}"], local=False)
    found = key_numbers(plan.to_json(plan.estimate(cfg)))
    file = HERE / f"{name}.json"
    if request.config.getoption("--update-golden", default=False) or os.environ.get("GOLDEN_UPDATE") == "1":
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert found == stored, f"{file} is out of date: run `pytest tests/golden --update-golden` and read the diff"


def test_no_file_without_a_preset():
    assert sorted(file.stem for file in HERE.glob("*.json")) == PRESETS
