"""MaxVio and combination usage, held against counting by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from ecdit_train.model.assignment import Selection, chosen
from ecdit_train.observe.routing import combination_usage, max_violation
from ecdit_train.observe.routing_scalars import COVERED


def selection(selected_GSE: torch.Tensor) -> Selection:
    gate = torch.rand(selected_GSE.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    return Selection(selected_GSE=selected_GSE, gate_GSE=gate, mean_rows=3.0, probability_GSE=gate)


@pytest.mark.parametrize("seed", range(20))
def test_who_is_chosen_is_read_off_rows_and_tables_alike(seed: int) -> None:
    selected = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(seed)) < 0.3
    said = selection(selected)
    wanted = selected.flatten(0, 1).float()
    assert torch.equal(chosen(said.rows()), wanted)
    assert torch.equal(chosen(said.rows().table()), wanted)
    assert torch.equal(chosen(said.capped(7 / 3)), wanted)
    capped = chosen(said.capped(1 / 3))  # one row per expert and group
    assert capped.sum() == selected.any(1).sum()
    assert (capped <= wanted).all()


@pytest.mark.parametrize("seed", range(20))
def test_against_counting(seed: int) -> None:
    selected = torch.rand(40, 6, generator=torch.Generator().manual_seed(seed)) < 0.25
    rows = [{e for e in range(6) if row[e]} for row in selected]
    loads = [sum(e in row for row in rows) for e in range(6)]
    assert max_violation(selected.float()).item() == pytest.approx(max(loads) / (sum(loads) / 6) - 1)
    together = sorted((sum({a, b} <= row for row in rows) for a, b in combinations(range(6), 2)), reverse=True)
    needed, covered = 0, 0
    while covered < COVERED * sum(together):
        covered += together[needed]
        needed += 1
    assert combination_usage(selected.float()).item() == pytest.approx(needed / 15)


def test_the_ends() -> None:
    assert max_violation(torch.eye(4)).item() == 0
    assert combination_usage(torch.eye(4)).item() == 0  # nobody works together
    two = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(9, 1)
    assert combination_usage(two).item() == pytest.approx(1 / 6)
    assert max_violation(two).item() == pytest.approx(1.0)
    assert combination_usage(torch.ones(5, 4)).item() == pytest.approx(1.0)  # six equal pairs: five cover 83 %
