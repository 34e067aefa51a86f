"""What may be switched on top of a layout changes no number: checkpointing,
overlap, accumulation, resharding, determinism."""

from __future__ import annotations

from dataclasses import replace

from dist_cases import MOE, TOKEN_CHOICE, case
from test_dist_grid import assert_equal

from ecdit_train.model.dispatchers.deterministic import Deterministic
from ecdit_train.model.dispatchers.triton import Triton
from ecdit_train.model.routers.expert_choice import ExpertChoice

DETERMINISTIC = replace(MOE, dispatcher=Deterministic(cap=None))
TRITON = replace(MOE, dispatcher=Triton(cap=None))


def test_options() -> None:
    all_axes = {"tp": 2, "ep": 4}
    assert_equal(
        4,
        [
            replace(c, steps=2)
            for c in (
                case(**all_axes, ac="full"),
                case(**all_axes, ac="selective"),
                case(tp=2, ac="selective", moe=TOKEN_CHOICE),
                case(ep=2, ac="selective", chunks=2),
                case(ep=2, ac="full", chunks=2),
                case(**all_axes, chunks=2),
                case(ep=4, chunks=3),
                case(tp=2, ep=2, chunks=2, moe=TOKEN_CHOICE),
                case(ep=2, microbatches=2),
                case(tp=2, ep=2, microbatches=4),
                case(rep=2, ep=2, microbatches=2),
                case(rep=2, tp=2, ep=4, microbatches=2, ac="selective", chunks=2, reshard="none"),
                case(**all_axes, moe=DETERMINISTIC),
                case(ep=2, moe=DETERMINISTIC, chunks=2),
                case(**all_axes, moe=TRITON),
                case(ep=2, moe=TRITON, chunks=2, ac="selective"),
            )
        ],
    )


def test_more_ranks_than_rows() -> None:
    """2 experts on 4 ranks of one expert mesh: they are cut along another dim; biases of 16 rows over 4, and so on."""
    few = replace(MOE, num_experts=2)
    assert_equal(
        4,
        [
            case(moe=few),
            case(ep=2, moe=replace(MOE, num_experts=4)),
            case(tp=2, moe=replace(MOE, num_experts=6, router=ExpertChoice(capacity_factor=1.5, sees="modulated"))),
        ],
    )
