"""Expert parallelism, applied from outside with DeepSpeed's all-to-all. The only importer of deepspeed.

Folded over tensor parallelism: the tokens of a tp group are the same on all its ranks, so each rank dispatches its own
1/tp of every expert's slots and the results are summed over tp. No token is computed twice, no expert is stored twice.

Where an expert's number of rows is fixed (a Table), everything is static: the slots are C times the groups, cut evenly (padded
with gate 0 where they do not divide), so one equal-split exchange each way suffices, with no exchange of counts and nothing read
back to the host. A varying number takes a second path, with counts first (`uneven.py`). Indices and gates stay on the rank that
made them; only rows travel, in the compute precision.

Legend: N tokens, D width, E experts (e on this rank), G groups, C capacity, S = G * C slots of an expert, s of them on
this rank, R rows that reach an expert here (s times ep ranks).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecdit_train.model.assignment import Assignment, Rows, Selection, Table
from ecdit_train.model.dit import DiT
from ecdit_train.model.moe import Dispatcher, Experts, MoE

from .collectives import all_to_all_start, all_to_all_wait, copy_to_group, equal_split_op, sum_over_group
from .hierarchical import Nodes
from .mesh import Mesh
from .placement import ParamPlacement
from .stopwatch import Stopwatch
from .uneven import Route, UnevenExchange

EXCHANGE = "ecdit::expert_exchange"
"""Name of the exchange as a torch op: selective checkpointing keeps its results, torch.compile keeps
it in the graph."""


@functools.cache
def _vendor() -> Any:
    """DeepSpeed's `_AllToAll`, ready to use on any torch group. Imported late: it costs seconds."""
    # Every rank would print that DeepSpeed found no GPU; it sets its own logger's level, so only this keeps it quiet.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        if not torch.cuda.is_available():
            import deepspeed.ops

            # Otherwise init_distributed compiles a C++ op on the spot: minutes, or a failure without a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        import deepspeed.comm
        from deepspeed.moe.sharded_moe import _AllToAll
    finally:
        logging.disable(before)
    # Needed although torch.distributed is up: it makes DeepSpeed's handle of it. No engine, no groups of its own.
    deepspeed.comm.init_distributed("nccl" if torch.cuda.is_available() else "gloo", dist_init_required=None)
    return _AllToAll


_WATCHES: dict[str, Stopwatch] = {}
"""By the name of the group: all that an op knows of it, as in torch's own registry."""
_UNWATCHED: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def exchange_seconds(mesh: Mesh) -> float | None:
    """What this rank's exchanges of experts' rows took since the last call, forward and backward, waits for peers
    included; of a hierarchical one the way across nodes. None where there are none, or where they are not apart: a varying
    number of rows, or chunks that travel under the experts' work."""
    by_node = mesh.ep_groups_by_node
    group = mesh.ep_group if by_node is None else by_node[1]
    watch = None if group is None else _WATCHES.get(group.group_name)
    return None if watch is None else watch.read()


def _timed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    with _WATCHES.get(group.group_name, _UNWATCHED):
        return _vendor().apply(group, x)


_exchange = equal_split_op(EXCHANGE, _timed)


@dataclass(frozen=True, kw_only=True)
class ExpertExchange:
    """Rows between their home rank (all E experts, own slots) and the experts' rank (own e
    experts, all ranks' slots).

    Out (`receive_out(send_out(x))`) and back (`receive_back(send_back(y))`) only move rows, and each is the inverse of the other:
    as maps they are orthogonal, so the gradient of out is back and the gradient of back is out. A backward of one's own may call
    the methods on gradients, without autograd; with it, all of them differentiate themselves.
    """

    group: dist.ProcessGroup
    overlap: bool
    """Two halves, `send_*` and `receive_*`, with the traffic in flight between; else all of it happens in `send_*`."""
    nodes: Nodes | None = None
    """Where rows travel inside of a node first and then across nodes (`parallel.exchange=hierarchical`)."""

    @property
    def ep(self) -> int:
        return self.group.size()

    def send_out(self, x_EsD: Tensor) -> Tensor:
        return self._send(x_EsD)

    def receive_out(self, x_EsD: Tensor) -> Tensor:
        """(E, s, D) as it came in, blocks of e experts by source rank -> (e, R, D)."""
        E, s, D = x_EsD.shape
        return self._receive(x_EsD).view(self.ep, E // self.ep, s, D).transpose(0, 1).reshape(E // self.ep, -1, D)

    def send_back(self, y_eRD: Tensor) -> Tensor:
        e, R, D = y_eRD.shape
        y_EsD = y_eRD.view(e, self.ep, R // self.ep, D).transpose(0, 1).reshape(e * self.ep, -1, D)
        return self._send(y_EsD)

    def receive_back(self, y_EsD: Tensor) -> Tensor:
        """(E, s, D): the rows this rank sent out, worked on."""
        return self._receive(y_EsD)

    def _send(self, x: Tensor) -> Tensor:
        if self.nodes is not None:
            x = self.nodes.gather(x)
        return all_to_all_start(x, self.timed) if self.overlap else _exchange(x, self.timed.group_name)

    def _receive(self, x: Tensor) -> Tensor:
        return all_to_all_wait(x, self.timed) if self.overlap else x

    @property
    def timed(self) -> dist.ProcessGroup:
        """The ranks whose exchange takes long: timed, kept for backward, hidden behind other work where there is some."""
        return self.group if self.nodes is None else self.nodes.across


class ExpertParallelDispatcher(Dispatcher):
    """A dispatcher over a mesh. `local` does the gathering and summing, so that its kind (deterministic or not) is kept."""

    def __init__(
        self,
        local: Dispatcher,
        *,
        exchange: ExpertExchange | None,
        tp_group: dist.ProcessGroup | None,
        tp_rank: int,
        tp_size: int,
        chunks: int,
    ) -> None:
        super().__init__(cap=local.cap)
        self._local = local
        self.exchange = self.travel = exchange
        self.tp_group, self.tp_rank, self.tp_size = tp_group, tp_rank, tp_size
        self.chunks = chunks
        self.uneven = UnevenExchange(group=exchange.group if exchange else None)
        if exchange is not None and exchange.overlap:
            self.pipeline = self._one_part_after_another

    @property
    def local(self) -> Dispatcher:
        return self._local

    def enter(self, x_ND: Tensor, table: Table) -> tuple[Tensor, Table]:
        """Like the tokens, gates are whole on every tp rank and each uses its share: gradients of both are summed over tp."""
        gates = copy_to_group(table.gate_EGC, self.tp_group)
        return copy_to_group(x_ND, self.tp_group), self._mine(replace(table, gate_EGC=gates))

    def leave(self, y_ND: Tensor) -> Tensor:
        return sum_over_group(y_ND, self.tp_group)

    def settle(self, assignment: Assignment) -> Assignment:
        """Of a varying number of rows: a static cap, or this tp rank's share of the list with the counts of all peers."""
        if not isinstance(assignment, Selection):
            return assignment
        if (table := self.local.limit(assignment)) is not None:
            return table
        rows = assignment.rows()
        gate_R = copy_to_group(rows.gate_R, self.tp_group)
        mine = replace(rows, gate_R=gate_R)
        if self.tp_size > 1:
            # By token, not by place in the list: should tp ranks decide differently about one row, no other row moves.
            own = (rows.index_R % self.tp_size == self.tp_rank).nonzero().squeeze(1)
            expert_R, index_R, gate_R = (x.index_select(0, own) for x in (rows.expert_R, rows.index_R, gate_R))
            mine = replace(rows, expert_R=expert_R, index_R=index_R, gate_R=gate_R)
        E = assignment.selected_GSE.shape[-1]
        return SharedRows(mine=mine, route=self.uneven.plan(mine.expert_R, num_experts=E), **vars(rows))

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Any:
        """(N, D) -> (e, R, D) for `Experts`, or the chunks in flight when exchanges overlap."""
        x_ND = copy_to_group(x_ND, self.tp_group)
        if isinstance(assignment, SharedRows):
            return self.uneven.send(self.local.gather(x_ND, assignment.mine.index_R), assignment.route)
        assert isinstance(assignment, Table)
        mine = self._mine(assignment)
        if self.exchange is None:
            return self.local.dispatch(x_ND, mine)
        sent = [self.exchange.send_out(self.local.dispatch(x_ND, part)) for part in self._cut(mine)]
        return sent if self.exchange.overlap else self.exchange.receive_out(sent[0])

    def combine(self, y: Any, assignment: Assignment, *, num_tokens: int) -> Tensor:
        """What the experts returned -> (N, D)."""
        if isinstance(assignment, SharedRows):
            rows = assignment.mine
            y_RD = self.uneven.send_back(y, assignment.route)
            part_ND = self.local.weigh(y_RD, rows.gate_R, rows.index_R, num_tokens=num_tokens)
            return sum_over_group(part_ND, self.tp_group)
        assert isinstance(assignment, Table)
        if self.exchange is None:
            y_EsD = y
        elif self.exchange.overlap:
            # One sum over all slots, in the order of a single chunk.
            y_EsD = torch.cat([self.exchange.receive_back(part) for part in y], dim=1)
        else:
            y_EsD = self.exchange.receive_back(self.exchange.send_back(y))
        # Like the tokens, gates are whole on every tp rank and each uses its share: their gradients are summed over tp.
        mine = self._mine(replace(assignment, gate_EGC=copy_to_group(assignment.gate_EGC, self.tp_group)))
        return sum_over_group(self.local.combine(y_EsD, mine, num_tokens=num_tokens), self.tp_group)

    def _one_part_after_another(self, experts: Experts, parts: Any) -> list[Tensor]:
        """While one part is worked on, the next arrives and the last one leaves: results leave as soon as they exist, so that they
        travel under the next part's products."""
        assert self.exchange is not None
        return [self.exchange.send_back(experts.compute(self.exchange.receive_out(part))) for part in parts]

    def _mine(self, assignment: Table) -> Table:
        """This tp rank's slots as a single group: tables (E, 1, s)."""
        index_ES, gate_ES = assignment.index_EGC.flatten(1), assignment.gate_EGC.flatten(1)
        filled_ES = None if assignment.filled_EGC is None else assignment.filled_EGC.flatten(1)
        missing = -index_ES.shape[1] % (self.tp_size * self.chunks)
        if missing:
            # Slots that nobody filled: token 0 with gate 0 adds nothing, forward or backward.
            filled_ES = torch.ones_like(index_ES, dtype=torch.bool) if filled_ES is None else filled_ES
            index_ES, gate_ES, filled_ES = (nn.functional.pad(x, (0, missing)) for x in (index_ES, gate_ES, filled_ES))
        s = index_ES.shape[1] // self.tp_size
        own = slice(self.tp_rank * s, (self.tp_rank + 1) * s)
        return replace(
            assignment,
            index_EGC=index_ES[:, None, own],
            gate_EGC=gate_ES[:, None, own],
            filled_EGC=None if filled_ES is None else filled_ES[:, None, own],
        )

    def _cut(self, mine: Table) -> Iterator[Table]:
        """This rank's slots, chunk by chunk."""
        size = mine.index_EGC.shape[2] // self.chunks
        for first in range(0, size * self.chunks, size):
            yield replace(
                mine,
                index_EGC=mine.index_EGC[:, :, first : first + size],
                gate_EGC=mine.gate_EGC[:, :, first : first + size],
                filled_EGC=None if mine.filled_EGC is None else mine.filled_EGC[:, :, first : first + size],
            )


@dataclass(frozen=True, kw_only=True)
class SharedRows(Rows):
    """All rows of these tokens (for metrics), and which of them this tp rank sends where."""

    mine: Rows
    route: Route


def sparse_layers(model: DiT) -> dict[str, MoE]:
    """The mixture-of-experts layers by their path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def apply_expert_parallel(model: DiT, *, mesh: Mesh, overlap_chunks: int) -> dict[str, ParamPlacement]:
    """Give every sparse layer this rank's experts and a dispatcher over the mesh; says where the experts lie.

    Experts shard themselves, whatever class they are. Without ep and tp nothing changes; with tp alone each rank keeps all experts
    and works on its share of the slots.
    """
    placements: dict[str, ParamPlacement] = {}
    chunks = overlap_chunks if mesh.ep_size > 1 else 1  # without an exchange there is nothing to hide
    exchange = None
    if mesh.ep_group is not None:
        by_node = mesh.ep_groups_by_node
        nodes = None if by_node is None else Nodes(inside=by_node[0], across=by_node[1])
        exchange = ExpertExchange(group=mesh.ep_group, overlap=chunks > 1, nodes=nodes)
        if chunks == 1:
            _WATCHES[exchange.timed.group_name] = Stopwatch(mesh.device_type)
            _vendor()  # collective setup belongs here, not in the middle of the first forward pass
    for path, moe in sparse_layers(model).items():
        for name, tensor in (*moe.experts.named_parameters(), *moe.experts.named_buffers()):
            is_buffer = not isinstance(tensor, nn.Parameter)  # whole on each of the ranks that hold these experts
            placements[f"{path}.experts.{name}"] = ParamPlacement(
                global_shape=tuple(tensor.shape),
                dim=0,
                index=mesh.ep_rank,
                count=mesh.ep_size,
                kind="expert",
                replicas=mesh.edp_size if is_buffer else 1,
                first_replica=mesh.edp_rank == 0 or not is_buffer,
            )
        if mesh.ep_size > 1:
            moe.experts.shard(index=mesh.ep_rank, count=mesh.ep_size)
        moe.router.on_ranks(dp_group=mesh.dp_group)
        if mesh.ep_size > 1 or mesh.tp_size > 1:
            kind = type(moe.dispatcher)
            if kind.settle is not Dispatcher.settle or Dispatcher.gather is kind.gather or Dispatcher.sum is kind.sum:
                raise TypeError(f"{kind.__name__} must define gather and sum, and not settle, to be spread over ranks")
            moe.dispatcher = ExpertParallelDispatcher(
                moe.dispatcher,
                exchange=exchange,
                tp_group=mesh.tp_group,
                tp_rank=mesh.tp_rank,
                tp_size=mesh.tp_size,
                chunks=chunks,
            )
    return placements
