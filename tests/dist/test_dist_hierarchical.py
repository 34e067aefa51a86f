"""The exchange that goes inside of nodes first moves the same rows to the same places as the flat one, to the bit."""

from __future__ import annotations

from typing import Any

import torch
from dist_cases import CAPPED, TOKEN_CHOICE, case, check_cases
from dist_harness import run_distributed
from torch.distributed.device_mesh import init_device_mesh

from ecdit_train.parallel.expert_parallel import ExpertExchange
from ecdit_train.parallel.hierarchical import Nodes


def both_ways(exchange: ExpertExchange, x: torch.Tensor) -> list[torch.Tensor]:
    """What arrives, what comes back, and the gradient of a weighted sum of both."""
    x = x.clone().requires_grad_()
    there = exchange.receive_out(exchange.send_out(x))
    weight = torch.arange(there.numel(), dtype=x.dtype).view_as(there).sin()
    back = exchange.receive_back(exchange.send_back(there * weight))
    (there.sum() + (back * x.detach().cos()).sum()).backward()
    return [there.detach(), back.detach(), x.grad]


def check_moves(runtime: Any, sizes: tuple[int, ...]) -> None:
    for node in sizes:
        check_nodes_of(node, runtime)


def check_nodes_of(node: int, runtime: Any) -> None:
    nodes = runtime.world // node
    mesh = init_device_mesh("cpu", (nodes, node), mesh_dim_names=("node", "local"))
    group = mesh._flatten("ep").get_group()
    by_node = Nodes(inside=mesh["local"].get_group(), across=mesh["node"].get_group())
    # Two experts on each rank, three rows for each; every number says where it comes from and where it goes.
    x = torch.arange(runtime.world * 2 * 3 * 2, dtype=torch.float64).view(-1, 3, 2) + 1000 * runtime.rank
    for overlap in (False, True):
        flat = ExpertExchange(group=group, overlap=overlap)
        hierarchical = ExpertExchange(group=group, overlap=overlap, nodes=by_node)
        for a, b in zip(both_ways(flat, x), both_ways(hierarchical, x), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            # Without autograd, as a backward of one's own does: back undoes out, so it is its gradient too.
            there = hierarchical.receive_out(hierarchical.send_out(x))
            assert torch.equal(hierarchical.receive_back(hierarchical.send_back(there)), x)
            assert torch.equal(hierarchical.receive_out(hierarchical.send_out(x)), there)


def test_rows_arrive_in_the_same_order() -> None:
    """3 nodes of 2 and 2 nodes of 3: what mixes up nodes and places on them cannot pass both."""
    run_distributed(6, check_moves, (2, 3))


def test_training_is_the_same() -> None:
    """2 nodes of 2: with and without chunks, folded over tp, under checkpointing (which leaves the first leg out)."""
    node = {"exchange": "hierarchical", "ep": 4, "steps": 2}
    cases = [
        case(**node), case(**node, chunks=2), case(**node, tp=2, ac="selective"), case(**node, ac="full"),
        case(**node, chunks=2, tp=2, ac="selective", keep=("experts",)), case(**node, moe=TOKEN_CHOICE, microbatches=2),
        case(**node, moe=CAPPED),
    ]  # fmt: skip
    for name, errors in run_distributed(4, check_cases, cases, timeout=280)[0]:
        print(f"{name:80s} {errors}")
        assert errors.within(1e-10), f"{name}: {errors}"


def test_a_missing_leg_is_noticed() -> None:
    cases = [case(ep=4, steps=1, exchange="hierarchical", poison="no_inside_leg")]
    ((name, errors),) = run_distributed(4, check_cases, cases)[0]
    assert errors.loss > 1e-4, f"{name}: {errors}"
