"""A plan as JSON. Keys are stable; numbers are plain, units in the table.

key                          value
---------------------------  ---------------------------------------------------------------------------------------
experiment, cluster, world   names of the run and the machine room; ranks
parameters.total             parameters, frozen encoders inside, as the paper counts
parameters.activated         the same with capacity_factor experts per sparse layer
parameters.network           the trained network only
parameters.encoders          frozen text encoder and image codec
parameters.by_part           {part: parameters} of the trained network (plan/parameters.py: PARTS)
table1                       null, or row, printed_total, total_deviation, printed_activated, activated_deviation, note
flops_per_step               model FLOPs of an optimizer step over all ranks (forward + 2 x backward)
flops.by_part                {part: model FLOPs}
flops.recompute              FLOPs repeated by activation checkpointing
flops.frozen_encoders        FLOPs of frozen encoders that run inside training
layout                       dp_replicate, dp_shard, tp, ep, edp, microbatch, microbatches, activation_checkpointing,
                             overlap_chunks, reshard_after_forward
memory_per_rank.<part>       bytes: parameters, gradients, optimizer, ema, gathered, communication, activations,
                             encoders, framework, never_together (plan/memory.py)
memory_per_rank.total        the peak: the sum of the parts, less never_together
fits, gpu_memory             whether total <= gpu_memory; bytes per GPU
min_nodes                    fewest nodes on which this layout fits; null if none up to 512
traffic_per_step.<kind>      bytes of one rank and step: message, intra_node, inter_node; kinds all_gather,
                             reduce_scatter, all_reduce, all_to_all, broadcast
traffic_per_step.flows       the same by purpose: kind, purpose, axis, ranks, calls, message, intra_node, inter_node
exchange_bytes               bytes one rank sends in one direction of one sparse layer and microbatch
step_time                    seconds and its parts, bounds best and worst, mfu, mfu_ceiling, tokens_per_second,
                             images_per_second_per_gpu (plan/step_time.py)
checkpoint_bytes             bytes of one committed checkpoint
suggested_layout             null, or layout, overrides (words for the command line), memory_total, seconds, mfu
suggested_min_nodes          fewest nodes on which any layout that was searched fits; null if none
warnings                     sentences
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .layout import Layout
from .memory import Memory
from .plan import Cost, Plan
from .suggest import overrides
from .traffic import Flow, exchange_bytes

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values for `json.dumps`; keys as in the module's table."""
    cfg, cost, parameters = plan.cfg, plan.cost, plan.parameters
    return {
        "experiment": cfg.experiment,
        "cluster": cfg.cluster.name,
        "world": cost.layout.world,
        "parameters": {
            "total": parameters.total,
            "activated": parameters.activated,
            "network": parameters.network,
            "encoders": parameters.encoders,
            "by_part": dict(parameters.by_part),
        },
        "table1": dataclasses.asdict(plan.table1) if plan.table1 else None,
        "flops_per_step": cost.flops.model,
        "flops": {
            "by_part": dict(cost.flops.by_part),
            "recompute": cost.flops.recompute,
            "frozen_encoders": cost.flops.frozen_encoders,
        },
        "layout": layout_json(cost.layout),
        "memory_per_rank": memory_json(cost.memory),
        "fits": cost.fits,
        "gpu_memory": cfg.cluster.gpu_memory,
        "min_nodes": plan.min_nodes,
        "traffic_per_step": traffic_json(cost.traffic),
        "exchange_bytes": 0.0 if cfg.moe.router == "dense" or cost.layout.ep == 1 else exchange_bytes(cfg, cost.layout),
        "step_time": dataclasses.asdict(cost.step_time),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "suggested_layout": suggestion_json(plan.suggested) if plan.suggested else None,
        "suggested_min_nodes": plan.suggested_min_nodes,
        "warnings": list(plan.warnings),
    }


def layout_json(layout: Layout) -> dict[str, Any]:
    names = (
        "dp_replicate",
        "dp_shard",
        "tp",
        "ep",
        "edp",
        "microbatch",
        "microbatches",
        "activation_checkpointing",
        "overlap_chunks",
        "reshard_after_forward",
    )
    return {name: getattr(layout, name) for name in names}


def memory_json(memory: Memory) -> dict[str, float]:
    return {**dataclasses.asdict(memory), "total": memory.total}


def traffic_json(flows: tuple[Flow, ...]) -> dict[str, Any]:
    def total(kind: str) -> dict[str, float]:
        mine = [f for f in flows if f.kind == kind]
        return {
            "message": sum(f.message for f in mine),
            "intra_node": sum(f.intra for f in mine),
            "inter_node": sum(f.inter for f in mine),
        }

    by_purpose = [
        {
            "kind": f.kind,
            "purpose": f.purpose,
            "axis": f.axis,
            "ranks": f.size,
            "calls": f.calls,
            "message": f.message,
            "intra_node": f.intra,
            "inter_node": f.inter,
        }
        for f in flows
    ]
    return {**{kind: total(kind) for kind in KINDS}, "flows": by_purpose}


def suggestion_json(cost: Cost) -> dict[str, Any]:
    return {
        "layout": layout_json(cost.layout),
        "overrides": list(overrides(cost.layout)),
        "memory_total": cost.memory.total,
        "seconds": cost.step_time.seconds,
        "mfu": cost.step_time.mfu,
    }
