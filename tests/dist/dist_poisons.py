"""Faults put in on purpose: a comparison that does not notice them proves nothing (`Case.poison`)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ecdit_train.model.dit import DiT
from ecdit_train.model.fp8 import Fp8Product, products
from ecdit_train.model.lean import Lean
from ecdit_train.parallel.expert_parallel import sparse_layers
from ecdit_train.parallel.hierarchical import Nodes
from ecdit_train.parallel.mesh import Mesh
from ecdit_train.parallel.owners import MatrixOwners
from ecdit_train.parallel.placement import local


def poison_expert_scale(model: DiT, mesh: Mesh) -> None:
    """Experts averaged over the ranks that hold them, like everything else."""
    for moe in sparse_layers(model).values():
        moe.experts.set_gradient_divide_factor(float(mesh.edp_size))


def poison_kv_sum(model: DiT, mesh: Mesh) -> None:
    """Ranks that share a kv head keep their own part of its gradient."""
    for block in model.blocks:
        assert block.self_attention.key.shared is not None
        block.self_attention.key.shared = None


def poison_stale_index(model: DiT, mesh: Mesh) -> None:
    """Combine with the assignment of the batch before: shapes and norms are right, rows go to other tokens."""
    moe = next(iter(sparse_layers(model).values()))
    combine, last = moe.dispatcher.combine, []

    def stale(y: Any, assignment: Any, *, num_tokens: int) -> Tensor:
        last.append(assignment.index_EGC)
        return combine(y, replace(assignment, index_EGC=last[-2] if len(last) > 1 else last[-1]), num_tokens=num_tokens)

    moe.dispatcher.combine = stale


def poison_gate_gradient(model: DiT, mesh: Mesh) -> None:
    """Each tp rank keeps the router gradient of its own slots."""
    for moe in sparse_layers(model).values():
        combine = moe.dispatcher.combine
        moe.dispatcher.combine = functools.partial(_combine_own_gates, combine, moe.dispatcher)


def _combine_own_gates(combine: Any, dispatcher: Any, y: Any, assignment: Any, *, num_tokens: int) -> Tensor:
    gate = assignment.gate_EGC
    # Undo the sum over tp: the gradient of the copy is divided by the group's size.
    gate = gate / dispatcher.tp_size + (gate - gate / dispatcher.tp_size).detach()
    return combine(y, replace(assignment, gate_EGC=gate), num_tokens=num_tokens)


def poison_lean_gates(model: DiT, mesh: Mesh) -> None:
    """Gates that travel with the lean layer's gradients arrive at their neighbours' rows: losses and norms look right."""
    send = Lean.send_gates
    Lean.send_gates = lambda lean, gate: send(lean, gate.roll(1, dims=1))  # type: ignore[method-assign]


def poison_drifted_copy(model: DiT, mesh: Mesh) -> None:
    """One tp rank's copy of a replicated weight differs in its last bits."""
    if mesh.tp_rank == 1:
        with torch.no_grad():
            local(model.final.weight).mul_(1 + 1e-14)


def poison_lost_piece(model: DiT, mesh: Mesh) -> None:
    """Of all matrices that travel to their owners, one piece arrives as zeros."""
    exchange = MatrixOwners._exchange

    def lossy(owners: MatrixOwners, leg: Any, values: Any) -> Any:
        if mesh.rank == 1 and leg is owners.rounds[0].out:
            values = [torch.zeros_like(values[0]), *values[1:]]
        return exchange(owners, leg, values)

    MatrixOwners._exchange = lossy  # type: ignore[method-assign]


def poison_stale_copy(model: DiT, mesh: Mesh) -> None:
    """One rank keeps its copy of one matrix's first box where its owner sent a new one."""
    exchange = MatrixOwners._exchange

    def deaf(owners: MatrixOwners, leg: Any, values: Any) -> Any:
        came = exchange(owners, leg, values)
        if mesh.rank == 1 and leg is owners.rounds[0].back:
            came[0][1].zero_()
        return came

    MatrixOwners._exchange = deaf  # type: ignore[method-assign]


def poison_skipped_counts(model: DiT, mesh: Mesh) -> None:
    """One rank's counts are missing from the sums by which the K-th largest score is found."""
    for moe in sparse_layers(model).values():
        if mesh.dp_rank == 1:
            add = moe.router.ranks.sum
            moe.router.ranks.sum = lambda x, add=add: add(x if x.shape[0] == x.shape[-1] else torch.zeros_like(x))


def poison_local_similarity(model: DiT, mesh: Mesh) -> None:
    """The similarity loss weighs experts by what this rank chose."""
    for moe in sparse_layers(model).values():
        add, E = moe.router.ranks.sum, moe.router.weight.shape[1]
        moe.router.ranks.sum = lambda x, add=add, E=E: mesh.dp_size * x if x.shape == (E, E) else add(x)


def poison_kept_product_summed_in_place(model: DiT, mesh: Mesh) -> None:
    """A row layer sums over tp on top of the product that was kept for backward, as Megatron does."""
    for module in model.modules():
        if getattr(module, "keeps_sum", False):
            module.keeps_sum = False
            module.forward = module.forward.__wrapped__


def poison_no_inside_leg(model: DiT, mesh: Mesh) -> None:
    """Rows go across nodes without having met inside of their own: shapes are right, the experts are others."""
    for moe in sparse_layers(model).values():
        exchange = moe.dispatcher.exchange
        assert exchange is not None
        assert exchange.nodes is not None
        moe.dispatcher.exchange = replace(
            exchange, nodes=_Across(inside=exchange.nodes.inside, across=exchange.nodes.across)
        )


class _Across(Nodes):
    def gather(self, x: Tensor) -> Tensor:
        return x


def poison_experts_counted_once(model: DiT, mesh: Mesh) -> None:
    """Experts that every replica holds count in the norm as if there were one copy."""
    mesh.hybrid_copies = lambda kind: 1 if kind == "expert" else mesh.degrees.dp_replicate  # type: ignore[method-assign]


def poison_lost_microbatch(model: DiT, mesh: Mesh) -> None:
    """The sum over hybrid sharding's copies takes the last microbatch's gradients alone."""
    told = model.set_requires_all_reduce

    def forgetful(flag: bool) -> None:
        told(flag)
        for module in model.modules():
            for group in module._get_fsdp_state()._fsdp_param_groups if flag and isinstance(module, FSDPModule) else ():
                group._partial_reduce_output = None

    model.set_requires_all_reduce = forgetful


def poison_fp8_own_scale(model: DiT, mesh: Mesh) -> None:
    """Each tp rank scales its part of a tensor by itself."""
    for module in model.modules():
        if isinstance(module, Fp8Product):
            module.agree = None


def poison_fp8_stale_scale(model: DiT, mesh: Mesh) -> None:
    """One rank remembers another largest magnitude of one layer's input."""
    if mesh.rank == 1:
        products(model)[0].amax[:, 0].mul_(4)


POISONS: dict[str, Any] = {
    "": lambda model, mesh: None,
    "expert_scale": poison_expert_scale,
    "kv_sum": poison_kv_sum,
    "stale_index": poison_stale_index,
    "gate_gradient": poison_gate_gradient,
    "lean_gates": poison_lean_gates,
    "drifted_copy": poison_drifted_copy,
    "lost_piece": poison_lost_piece,
    "stale_copy": poison_stale_copy,
    "skipped_counts": poison_skipped_counts,
    "fp8_own_scale": poison_fp8_own_scale,
    "fp8_stale_scale": poison_fp8_stale_scale,
    "local_similarity": poison_local_similarity,
    "kept_product_summed_in_place": poison_kept_product_summed_in_place,
    "no_inside_leg": poison_no_inside_leg,
    "experts_counted_once": poison_experts_counted_once,
    "lost_microbatch": poison_lost_microbatch,
}
