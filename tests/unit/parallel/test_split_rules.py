"""Which layers are split, what is refused, and where the boxes lie; all on one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_configs import moe_config
from plain_configs import model_config
from torch import Tensor

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import ModelConfig
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError
from ecdit_train.model.assignment import Table
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.dit import DiT
from ecdit_train.parallel import tensor_parallel
from ecdit_train.parallel.expert_parallel import ExpertParallelDispatcher
from ecdit_train.parallel.placement import Box, ParamPlacement, pieces

MODEL = model_config(width=32, heads=4, kv_heads=2)
MOE = moe_config(num_experts=6, capacity_factor=1.5, group_size=16)


def make(model: ModelConfig = MODEL) -> DiT:
    with torch.device("meta"):
        return DiT(model, MOE, channels=4, text_features=8)


def test_split_layers() -> None:
    split = {
        path: how
        for path, module in make().named_modules()
        if isinstance(module, torch.nn.Linear) and (how := tensor_parallel.split_of(path))
    }
    attention = {
        f"{kind}_attention.{name}": "row" if name == "out" else "column"
        for kind in ("self", "cross")
        for name in ("query", "key", "value", "out")
    }
    dense = {"feed_forward.up": "column", "feed_forward.down": "row"}
    blocks = (attention | dense, attention)
    assert split == {f"blocks.{n}.{name}": how for n, block in enumerate(blocks) for name, how in block.items()}


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (3, 1), (8, 1), (1, 3), (1, 4)])
def test_the_configurations_rules_are_those_of_the_layers(tp: int, ep: int) -> None:
    """Stated once, in config/layout.py: what it lets pass can be split, what it refuses cannot."""
    base = compose(["experiment=shapes_tiny"], local=False)
    parallel = replace(base.parallel, tp=tp, ep=ep)
    cfg = replace(base, model=replace(MODEL, heads=4, width=256), moe=replace(MOE, group_size=144), parallel=parallel)
    if (tp, ep) in ((2, 1), (4, 1), (1, 3)):
        validate(cfg)
        return
    with pytest.raises(ConfigError) as caught:
        validate(cfg)
    assert {p.field for p in caught.value.problems} <= {"parallel.tp", "parallel.ep"}


def test_boxes() -> None:
    """(box of the global tensor, number of the first local element) of every piece."""

    def found(local: Tensor, placement: ParamPlacement) -> list[tuple[Box, int]]:
        return [(piece.box, int(piece.view.flatten()[0])) for piece in pieces(local, placement)]

    x = torch.arange(12).view(4, 3)
    assert found(x, ParamPlacement(global_shape=(4, 6), dim=1, index=1, count=2)) == [(Box((0, 3), (4, 3)), 0)]
    two = ParamPlacement(global_shape=(8, 3), dim=0, boxes=((6, 0, 2), (0, 2, 2)))
    assert found(x, two) == [(Box((6, 0), (2, 3)), 0), (Box((0, 0), (2, 3)), 6)]
    assert found(torch.empty(0, 3), ParamPlacement(global_shape=(0, 3))) == []


@pytest.mark.parametrize(("tp", "pools", "capacity"), [(1, 2, 3), (2, 1, 4), (2, 3, 3), (4, 2, 3)])
def test_tp_ranks_share_the_slots(tp: int, pools: int, capacity: int) -> None:
    """Without groups, the parts of all tp ranks add up to the local dispatcher's result, also where they are padded."""
    E, N, D = 3, 24, 5
    assignment = Table(
        index_EGC=torch.randint(N, (E, pools, capacity)),
        gate_EGC=torch.rand(E, pools, capacity),
        probability_GSE=torch.empty(0),
    )
    x = torch.randn(N, D)
    whole = IndexAddDispatcher().combine(IndexAddDispatcher().dispatch(x, assignment), assignment, num_tokens=N)
    total: Tensor = torch.zeros(N, D)
    for rank in range(tp):
        part = ExpertParallelDispatcher(
            IndexAddDispatcher(), exchange=None, tp_group=None, tp_rank=rank, tp_size=tp, chunks=1
        )
        rows = part.dispatch(x, assignment)
        assert rows.shape == (E, -(-pools * capacity // tp), D)
        total += part.combine(rows, assignment, num_tokens=N)
    torch.testing.assert_close(total, whole)
