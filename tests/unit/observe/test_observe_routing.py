"""Routing scalars against numbers worked out by hand, and maps that add up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from observe_demo_run import assignments, picture, routing_maps, routing_scalars

from ecdit_train.config.slots import RouterSizes
from ecdit_train.errors import RunFolderError
from ecdit_train.model.assignment import Rows, Table
from ecdit_train.model.router import RouterInput
from ecdit_train.model.routers.token_choice import TokenChoice
from ecdit_train.observe.routing import RoutingMaps, count_maps, expert_maps


def by_hand(*, filled: bool = False) -> Table:
    """E = 2, G = 1, C = 2, S = 4: expert 0 takes tokens 0 and 1, expert 1 takes 0 and 2; nobody takes 3."""
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    return Table(
        index_EGC=torch.tensor([[[0, 1]], [[0, 2]]]),
        gate_EGC=torch.tensor([[[0.5, 1.0]], [[0.5, 0.0]]]),
        filled_EGC=torch.tensor([[[True, True]], [[True, False]]]) if filled else None,
        probability_GSE=p[None],
    )


def test_expert_choice_by_hand() -> None:
    """Counts are 2, 1, 1, 0: mean 1, variance (1 + 0 + 0 + 1) / 4."""
    s = routing_scalars([[by_hand()]], layers=(2,))
    assert s["moe/L2/dropped_frac"] == 0.25
    assert s["moe/L2/experts_per_token_std"] == pytest.approx(math.sqrt(0.5))
    assert s["moe/L2/experts_per_token_max"] == 2
    assert s["moe/L2/entropy"] == pytest.approx(0.5)  # two tokens undecided, two certain
    assert s["moe/L2/gate_mean"] == 0.5
    assert "moe/L2/load_cv" not in s
    assert "moe/L2/overflow_frac" not in s


def test_empty_slots_do_not_count() -> None:
    s = routing_scalars([[by_hand(filled=True)]], layers=(2,))
    assert s["moe/L2/gate_mean"] == pytest.approx(2 / 3)
    assert s["moe/L2/dropped_frac"] == 0.5


def test_a_list_of_rows_says_the_same_as_the_table() -> None:
    table = by_hand()
    rows = Rows(
        expert_R=torch.tensor([0, 0, 1, 1]),
        index_R=table.index_EGC.flatten(),
        gate_R=table.gate_EGC.flatten(),
        probability_GSE=table.probability_GSE,
    )
    said = routing_scalars([[rows]], layers=(2,))
    assert said.pop("moe/load_cv") == said.pop("moe/L2/load_cv") == 0.0  # loads of lists may vary: so they are told
    assert said == routing_scalars([[table]], layers=(2,))


def test_what_a_router_reports_is_logged_by_layer_and_over_layers() -> None:
    one, two = (replace(by_hand(), metrics={"mine": torch.tensor(v), "mine_max": torch.tensor(v)}) for v in (1.0, 3.0))
    s = routing_scalars([[one, two]], layers=(2, 4))
    assert (s["moe/L2/mine"], s["moe/L4/mine"], s["moe/mine"], s["moe/mine_max"]) == (1.0, 3.0, 2.0, 3.0)


def test_token_choice_reports_loads_and_overflow() -> None:
    """All tokens prefer expert 0 of two, which serves half of them: loads 2 and 0, two of four choices are dropped."""
    router = TokenChoice(capacity_factor=1.0, top_k=1, balance_weight=0.0, sees="modulated").build(
        RouterSizes(width=2, num_experts=2, patch_values=1)
    )
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.0]]))
    s = routing_scalars([[router(RouterInput.of(torch.ones(1, 4, 2)))]], layers=(2,))
    assert s["moe/L2/overflow_frac"] == 0.5
    assert s["moe/L2/load_cv"] == pytest.approx(1.0)


def test_over_layers() -> None:
    """A second layer in which the dropped token is taken: nothing is dropped everywhere."""
    other = by_hand()
    other.index_EGC[1, 0, 0] = 3  # counts 1, 1, 1, 1
    s = routing_scalars([[by_hand(), other]], layers=(2, 4))
    assert float(s["moe/dropped_frac"]) == 0.125
    assert float(s["moe/dropped_everywhere_frac"]) == 0.0
    assert float(s["moe/experts_per_token_max"]) == 2
    assert float(routing_scalars([[by_hand()]], layers=(2,))["moe/dropped_everywhere_frac"]) == 0.25
    assert routing_scalars([[]], layers=()) == {}


def test_maps_add_up_to_all_slots() -> None:
    images = np.stack([picture(n, noise=0.2) for n in range(4)])
    called = assignments(images, t=0.8)
    counts = count_maps(called, batch=4, side=8)
    assert counts.shape == (3, 4, 8, 8)
    E, G, C = called[0].index_EGC.shape
    assert counts.sum((1, 2, 3)).tolist() == [E * C * G] * 3
    assert counts.flatten(2).sum(-1).eq(E * C).all()  # pools of one image
    # In token choice, slots that stay empty are nobody's.
    called = assignments(images, t=0.8, token_choice=True, capacity_factor=1.0)
    assert count_maps(called, batch=4, side=8).sum((1, 2, 3)).tolist() == [int((a.gate_EGC > 0).sum()) for a in called]


def test_masked_maps_put_tokens_back_in_their_places() -> None:
    """One image of 4 kept patches out of 9; counts 2, 1, 1, 0 in token order."""
    keep = torch.tensor([[1, 2, 6, 8]])
    assert count_maps([by_hand()], batch=1, side=3, keep=keep).tolist() == [[[[0, 2, 1], [0, 0, 0], [1, 0, 0]]]]


def test_maps_survive_a_file_without_pickle(tmp_path: Path) -> None:
    maps = routing_maps(300)
    maps.save(tmp_path / "routing/step_00000300.npz")
    back = RoutingMaps.load(tmp_path / "routing/step_00000300.npz")
    for name in ("counts", "timesteps", "images", "chosen"):
        np.testing.assert_array_equal(getattr(back, name), getattr(maps, name))
    for name in ("layers", "prompts", "scope", "group_size", "experts", "capacity_factor", "step"):
        assert getattr(back, name) == getattr(maps, name)
    assert "step 300" in back.caption()
    assert "f_c = 2" in back.caption()


def test_who_took_a_patch_is_what_the_assignment_says() -> None:
    """Eleven experts: bits of two bytes."""
    images = np.stack([picture(n, noise=0.05) for n in range(2)])
    called = assignments(images, t=0.5, experts=11, capacity_factor=2.75)
    packed = expert_maps(called, batch=2, side=8)
    assert packed.shape == (3, 2, 8, 8, 2)
    maps = replace(
        routing_maps(3),
        counts=count_maps(called, batch=2, side=8)[None].to(torch.uint8).numpy(),
        chosen=packed[None].numpy(),
        timesteps=np.array([0.5], np.float32),
        prompts=("a", "b"),
        images=images,
        experts=11,
    )
    for layer, table in enumerate(called):
        for image in range(2):
            who = {(int(token), e) for e in range(11) for token in table.index_EGC[e, image].tolist()}
            taken = maps.experts_at(0, layer=layer, image=image)
            assert {(image * 64 + y * 8 + x, e) for y, x, e in np.argwhere(taken).tolist()} == who
            assert (taken.sum(-1) == maps.counts[0, layer, image]).all()


def test_maps_of_an_older_run_count_without_naming(tmp_path: Path) -> None:
    replace(routing_maps(3), chosen=None).save(tmp_path / "old.npz")
    assert RoutingMaps.load(tmp_path / "old.npz").chosen is None


def test_damaged_maps_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "a.npz"
    routing_maps(1).save(whole)
    cut = tmp_path / "b.npz"
    cut.write_bytes(whole.read_bytes()[:2000])
    np.savez(tmp_path / "c.npz", meta=np.array([object()], dtype=object))
    for path in (cut, tmp_path / "c.npz", tmp_path / "missing.npz"):
        with pytest.raises(RunFolderError, match=path.name):
            RoutingMaps.load(path)
