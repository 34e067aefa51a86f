"""What is compared between one process and many: what a step logs, and how far two traces lie apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecdit_train.model.dit import DiT, Prediction
from ecdit_train.model.moe import MoE
from ecdit_train.observe.metrics import AllReduce, MetricWindow
from ecdit_train.observe.routing_scalars import routing_record, routing_sums, weight_sums
from ecdit_train.observe.timesteps import loss_by_timestep, loss_sums

if TYPE_CHECKING:
    from dist_cases import Trace


def record_of(
    model: DiT, parts: list[tuple[dict[str, Tensor], Prediction]], reduce: AllReduce | None = None
) -> dict[str, float]:
    """The record of a step of these microbatches, without what measures the machine."""
    layers = tuple(number for number, block in enumerate(model.blocks, 1) if isinstance(block.feed_forward, MoE))
    window = MetricWindow(device=parts[0][1].patches_BKP.device, images_per_step=1, tokens_per_step=1)
    for part, prediction in parts:
        error_B = (prediction.patches_BKP - part["target"]).square().mean((1, 2)).float()
        window.add_sums(loss_sums(error_B, t_B=part["t"]))
        window.add_sums(routing_sums(prediction.assignments, layers=layers, t_B=part["t"]))
    window.add_sums(weight_sums(model.routers, layers=layers))
    reading = lambda sums: {**loss_by_timestep(sums), **routing_record(sums, layers=layers)}  # noqa: E731
    return {k: v for k, v in window.flush(reduce, reading=reading).items() if k.startswith(("moe/", "diffusion/"))}


BUFFER_BOUND = 1e-6
"""What routers observe is averaged in fp32 whatever the network's type is; absolute."""


def record_error(name: str, mine: float, theirs: float) -> float:
    """Relative; absolute of what is a difference or a cosine, whose own size may be any."""
    differs = name.endswith(("edge_margin", "similarity", "similarity_max", "timestep_std"))
    return abs(mine - theirs) / (1.0 if differs else max(abs(theirs), 1e-3))


RECORD_BOUND = 1e-6
"""Of what is logged: counts are equal, and means of fp32 numbers nearly so."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Largest relative differences from the reference."""

    loss: float
    grad: float
    grad_name: str
    norm: float
    weight: float
    buffer: float
    record: float
    """Of what is logged of the first step, of which all layouts have the same weights."""
    later_records: float
    same_choices: bool
    copies_agree: bool

    def worst(self, bound: float, *, grad: float) -> float:
        """The largest of loss, norm, weights and gradients, each as a share of its bound."""
        return max(self.loss / bound, self.norm / bound, self.weight / bound, self.grad / grad)

    def within(self, bound: float, *, grad: float | None = None) -> bool:
        """`grad`: a bound of its own for gradients."""
        return (
            max(self.loss, self.norm, self.weight) <= bound
            and self.buffer <= max(bound, BUFFER_BOUND)
            and self.grad <= (grad or bound)
            and self.record <= RECORD_BOUND
            and self.later_records <= max(bound, RECORD_BOUND)
            and self.same_choices
            and self.copies_agree
        )


def compare(trace: Trace, reference: Trace) -> Errors:
    grad, grad_name = 0.0, ""
    for mine, theirs in zip(trace.grads, reference.grads, strict=True):
        for name, g in theirs.items():
            assert g.norm() > 0, f"{name}: the reference gradient is zero, so the comparison would say nothing"
            error = ((mine[name] - g).norm() / g.norm()).item()
            if not error <= grad:
                grad, grad_name = error, name
    records = [
        max((record_error(name, mine[name], value) for name, value in theirs.items()), default=0.0)
        for mine, theirs in zip(trace.records, reference.records, strict=True)
    ]
    assert [record.keys() for record in trace.records] == [record.keys() for record in reference.records]
    return Errors(
        record=records[0],
        later_records=max(records[1:], default=0.0),
        loss=max(abs(a - b) / abs(b) for a, b in zip(trace.losses, reference.losses, strict=True)),
        norm=max(abs(a - b) / abs(b) for a, b in zip(trace.norms, reference.norms, strict=True)),
        weight=max(((trace.weights[n] - w).norm() / w.norm()).item() for n, w in reference.weights.items()),
        grad=grad,
        grad_name=grad_name,
        buffer=max((float((trace.buffers[n] - b).abs().max()) for n, b in reference.buffers.items()), default=0.0),
        copies_agree=trace.copies_agree,
        same_choices=all(
            torch.equal(a, b)
            for x, y in zip(trace.chosen, reference.chosen, strict=True)
            for a, b in zip(x, y, strict=True)
        ),
    )
