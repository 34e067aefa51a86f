"""What a result file becomes at W&B, number by number."""

from __future__ import annotations

import json

import numpy as np
import pytest
from observe_wandb_runs import allocated

from ecdit_train.errors import RunFolderError
from ecdit_train.evaluate.allocation import document
from ecdit_train.observe import wandb_tables
from ecdit_train.observe.routing_numbers import LayerNumbers, RoutingNumbers


def test_each_layer_timestep_and_kind_is_a_row_of_the_allocation_table(tmp_path):
    path = tmp_path / "step_00000007.json"
    kinds = {"true": allocated(seeds=2), "drawn": allocated(seeds=1)}
    path.write_text(json.dumps(document(kinds, step=7, layers=[2, 4, 6])))
    result = wandb_tables.read(path)
    assert (result.suite, result.step, result.pictures) == ("allocation", 7, {})
    table = result.tables["alloc"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert len(rows) == 2 * 2 * 3
    (row,) = [r for r in rows if (r["kind"], r["layer"], r["t"]) == ("true", 4, 0.75)]
    # cells of timestep 1, layer number 1: 4 and 10, so mean 7 and standard deviation 3 * sqrt(2)
    spread = pytest.approx(18**0.5, abs=1e-5)
    assert row == {
        "layer": 4,
        "t": 0.75,
        "kind": "true",
        "AUC": 507.0,
        "object mean": 107.0,
        "object spread": spread,
        "background mean": 207.0,
        "background spread": spread,
        "unselected object": 307.0,
        "unselected background": 407.0,
    }
    (alone,) = [r for r in rows if (r["kind"], r["layer"], r["t"]) == ("drawn", 2, 0.25)]
    assert (alone["object mean"], alone["object spread"]) == (100.0, None), "one seed has no spread"
    ratio, error = kinds["true"].ratio()
    assert result.numbers["eval/allocation/true_ratio"] == pytest.approx(ratio, abs=1e-6)
    assert result.numbers["eval/allocation/true_ratio_error"] == pytest.approx(error, abs=1e-6)
    assert "eval/allocation/drawn_ratio_error" not in result.numbers, "it is infinite"


def test_an_evaluation_is_a_row_for_each_task(tmp_path):
    path = tmp_path / "shapes_00000005.json"
    made = {"step": 5, "overall": 0.4, "chance": 0.1, "num_images": 8}
    made |= {"by_task": {"colors": 0.5, "counting": 0.3}, "chance_by_task": {"colors": 0.125}}
    path.write_text(json.dumps(made))
    result = wandb_tables.read(path)
    assert result.tables["eval/shapes/tasks"] == wandb_tables.Table(
        columns=("task", "correct", "chance", "step"),
        rows=(("colors", 0.5, 0.125, 5), ("counting", 0.3, None, 5), ("overall", 0.4, 0.1, 5)),
    )
    assert result.numbers == {
        "eval/shapes/overall": 0.4,
        "eval/shapes/chance": 0.1,
        "eval/shapes/num_images": 8,
        "eval/shapes/colors": 0.5,
        "eval/shapes/counting": 0.3,
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"kinds": {"true": {}}, "step": 1, "layers": [2]}', '{"by_task": {}}'])
def test_a_file_of_another_form_is_named(text, tmp_path):
    path = tmp_path / "step_00000001.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=r"step_00000001\.json: not a result"):
        wandb_tables.read(path)


def test_experts_per_token_are_counted_over_timesteps(tmp_path):
    spread = np.zeros((10, 9), np.int64)
    spread[0, [0, 2]], spread[9, [2, 3]] = (5, 7), (1, 4)
    none = np.full(10, np.nan)
    layer = LayerNumbers(
        spread=spread, entropy=none, edge_margin=none, load=np.ones(8), gate=np.ones(8), timestep=np.ones(8)
    )
    RoutingNumbers(step=3, experts=8, layers={2: layer}).save(tmp_path)
    found = wandb_tables.histograms(tmp_path, 3)
    assert found == {
        "routing/L2/experts_per_token": wandb_tables.Counted(counts=(5, 0, 8, 4), edges=(-0.5, 0.5, 1.5, 2.5, 3.5))
    }
    assert wandb_tables.histograms(tmp_path, 4) == {}
    (tmp_path / "routing" / "numbers_00000003.json").write_text("{")
    assert wandb_tables.histograms(tmp_path, 3) == {}
