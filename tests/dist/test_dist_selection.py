"""Routers that select over all ranks equal one process on every layout: loss with its auxiliary parts, every gradient,
norm, weights after 3 steps, who was chosen, buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dist_cases import FAMILY, RACE, case, check_cases
from dist_harness import run_distributed
from dist_selection import chosen_at_inference, measured_messages, selected_alike
from test_dist_compile import assert_equal as assert_compiled_equal
from test_dist_grid import assert_equal

from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.dispatchers.index_add import IndexAdd

CAPPED_RACE = replace(RACE, dispatcher=IndexAdd(cap=1.25))


def test_two_ranks() -> None:
    """Every axis alone, and experts folded over tp."""
    cases = [
        case(moe=moe, **at) for moe in (RACE, FAMILY["be"]) for at in ({}, {"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2})
    ]
    cases += [case(moe=FAMILY["bl"], ep=2), case(moe=FAMILY["le"], tp=2, ep=2), case(moe=FAMILY["tc"], ep=2),
              case(moe=FAMILY["ec_image"], tp=2, ep=2), case(moe=RACE, rep=2, ac="selective"),
              case(moe=CAPPED_RACE, ep=2, ac="selective")]  # fmt: skip
    cases += [
        case(moe=moe, dtype="float32", **at)
        for moe in (RACE, FAMILY["be"], FAMILY["bl"])
        for at in ({"tp": 2, "ep": 2}, {"ep": 2})
    ]
    assert_equal(2, cases)


def test_four_ranks() -> None:
    """Pairs of axes; checkpointing decides once."""
    assert_equal(
        4,
        [
            case(moe=RACE, tp=2, ep=2),
            case(moe=RACE, ep=4, ac="selective"),
            case(moe=RACE, rep=2, ep=2, ac="full"),
            case(moe=FAMILY["bl"], tp=2, ep=4),
            case(moe=FAMILY["be"], rep=2, ep=4),
            case(moe=FAMILY["tc"], tp=2, ep=4),
            case(moe=RACE, rep=2, tp=2, ep=2, dtype="float32"),
        ],
    )


def test_eight_ranks() -> None:
    assert_equal(8, [case(moe=RACE, rep=2, tp=2, ep=4), case(moe=FAMILY["be"], ep=8)])


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("router", ["race", *FAMILY])
def test_eight_ranks_grid(router: str, tp: int) -> None:
    moe = {"race": RACE, **FAMILY}[router]
    cases = [case(tp=tp, ep=ep, rep=rep, moe=moe, steps=2) for ep in (1, 2, 4, 8) for rep in (1, 2)]
    assert_equal(8, [*cases, case(tp=tp, ep=4, moe=moe, dtype="float32", steps=2)])


@pytest.mark.slow
def test_compiled_code() -> None:
    """Inductor's collectives work in place: the counts of a selection must survive them."""
    assert_compiled_equal([case(ep=2, moe=RACE, compiled=True, ac="selective", steps=1),
                           case(tp=2, moe=FAMILY["be"], compiled=True, steps=1)], backend="inductor")  # fmt: skip


def test_real_ranks_select_exactly() -> None:
    """Ties, specials and uneven sizes over gloo, against a plain sort of all candidates."""
    for world in (2, 4):
        assert run_distributed(world, selected_alike, 40) == [40] * world


def test_messages_are_those_of_the_plan() -> None:
    """What one forward pass of a layer's router sends on real ranks, message by message, is what it says."""
    sizes = RouterSizes(width=16, num_experts=8, patch_values=12)
    for moe in (RACE, FAMILY["be"], FAMILY["bl"], FAMILY["tc"]):
        said = [(m.kind, m.bytes) for m in moe.router.messages(sizes, image_tokens=8, ranks=4)]
        assert run_distributed(4, measured_messages, moe.router, sizes, 8) == [said] * 4
        assert bool(said) == moe.router.over_ranks


def test_threshold_inference_is_the_same_on_one_and_four_ranks() -> None:
    one = run_distributed(1, chosen_at_inference, RACE)[0]
    four = run_distributed(4, chosen_at_inference, RACE)
    assert four == [one] * 4
    assert len(one) == 2
    assert 0 < sum(map(sum, one[0])) < len(one[0]) * len(one[0][0])


def test_a_rank_that_leaves_out_its_counts_is_found() -> None:
    (name, errors), (other, without) = run_distributed(
        2,
        check_cases,
        [case(moe=RACE, steps=1, poison="skipped_counts"), case(moe=RACE, steps=1, poison="local_similarity")],
    )[0]
    print(name, errors, other, without)
    assert not errors.same_choices
    assert not errors.within(1e-6)
    assert without.same_choices, "this fault leaves who is chosen untouched"
    assert not without.within(1e-6)
