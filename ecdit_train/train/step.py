"""One optimizer step. The only file that decides what a step is.

Legend: B images of one microbatch, C channels, H W latent height and width, K kept patches, P values of a patch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ecdit_train.diffusion.flow import Flow, interpolate
from ecdit_train.diffusion.microbatch import Microbatch
from ecdit_train.model.assignment import Assignment
from ecdit_train.model.dit import DiT
from ecdit_train.model.embed import Text, patchify, take_tokens
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.supervise.beats import Enter, untold

from .device_guard import DeviceGuard, Reading
from .state import TrainState


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One microbatch, for those who watch; device tensors."""

    t_B: Tensor
    """Timestep of each image."""
    error_B: Tensor
    """Each image's own loss, fp32."""
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A pass over a microbatch."""

    loss: Tensor
    auxiliary: dict[str, Tensor]
    """Routers' auxiliary losses by name, weights included."""
    seen: Seen


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the device says of a step: over all ranks, `own_finite` aside."""

    loss: float
    auxiliary: Mapping[str, float]
    """Routers' auxiliary losses by name, weights included."""
    grad_norm: float
    """Before clipping."""
    own_finite: bool
    """Whether this rank's own losses are."""
    finite: bool
    """Whether all numbers of all ranks are."""
    spike: bool
    """Whether any rank calls the loss one."""
    applied: bool
    """Whether the update was made."""

    def __str__(self) -> str:
        others = "".join(f", {n} loss {v}" for n, v in self.auxiliary.items() if not math.isfinite(v))
        return f"loss {self.loss}{others}, gradient norm {self.grad_norm}"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A step that the device was asked for: its update is made or refused there."""

    reading: Reading
    auxiliary: tuple[str, ...]

    def numbers(self) -> Numbers:
        """Waits for the device to have come to this step's numbers; what it was asked afterwards goes on."""
        loss, *auxiliary, norm, own_finite, strange, spike, refused = self.reading.get()
        return Numbers(
            loss=loss,
            auxiliary=dict(zip(self.auxiliary, auxiliary, strict=True)),
            grad_norm=norm,
            own_finite=bool(own_finite),
            finite=not strange,
            spike=bool(spike),
            applied=not refused,
        )


@dataclass(kw_only=True)
class Accumulated:
    """What the microbatches of a step left on this rank; device tensors."""

    losses: list[Tensor] = field(default_factory=list)
    auxiliary: dict[str, list[Tensor]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    @property
    def assignments(self) -> list[tuple[Assignment, ...]]:
        return [seen.assignments for seen in self.seen]


def forward_backward(
    model: DiT,
    microbatches: list[Microbatch],
    *,
    flow: Flow,
    group_tokens: int,
    parallel: ParallelContext,
    enter: Enter = untold,
) -> Accumulated:
    """Accumulate the gradients of the mean loss over all microbatches; nothing here waits for the device."""
    num, done = len(microbatches), Accumulated()
    for n, micro in enumerate(microbatches):
        with parallel.accumulate(last=n == num - 1):
            enter("forward")
            out = forward(model, micro, flow=flow, group_tokens=group_tokens)
            enter("backward")
            (sum(out.auxiliary.values(), out.loss) / num).backward()
        assert n == 0 or out.auxiliary.keys() == done.auxiliary.keys(), (
            "a router has other losses than in the microbatch before"
        )
        done.losses.append(out.loss.detach())
        for name, value in out.auxiliary.items():
            done.auxiliary.setdefault(name, []).append(value.detach())
        done.seen.append(out.seen)
    return done


def forward(model: DiT, micro: Microbatch, *, flow: Flow, group_tokens: int) -> Forward:
    """The losses of a microbatch, and what is to be seen of it."""
    _, C, H, W = micro.latents_BCHW.shape
    draws = flow.draw(micro.position_B, shape=(C, H, W))
    x_t = interpolate(micro.latents_BCHW, draws.eps_BCHW, draws.t_B)
    drop_B = draws.drop_B if micro.captioned_B is None else draws.drop_B | ~micro.captioned_B
    text = Text(features_BLX=micro.features_BLX, mask_BL=micro.mask_BL, drop_B=drop_B)
    prediction = model(x_t, t_B=draws.t_B, text=text, keep_BK=draws.keep_BK, group_tokens=group_tokens)
    x_BKP, eps_BKP = (patchify(z, patch=model.patch) for z in (micro.latents_BCHW, draws.eps_BCHW))
    if draws.keep_BK is not None:
        x_BKP, eps_BKP = take_tokens(x_BKP, draws.keep_BK), take_tokens(eps_BKP, draws.keep_BK)
    truth = {"x_BKP": x_BKP, "eps_BKP": eps_BKP, "t_B": draws.t_B}
    error_B = flow.errors(prediction.patches_BKP, **truth)
    return Forward(
        loss=flow.loss(prediction.patches_BKP, **truth),
        auxiliary=prediction.losses(functools.partial(flow.loss, **truth)),
        seen=Seen(t_B=draws.t_B, error_B=error_B, assignments=prediction.assignments),
    )


def unwatched(seen: Sequence[Seen]) -> None:
    """The `watch` of a step that nobody looks at."""


def nothing() -> None:
    """The `before` of a step that nobody waits for."""


def train_step(
    microbatches: list[Microbatch],
    *,
    parallel: ParallelContext,
    state: TrainState,
    guard: DeviceGuard,
    lr: float,
    max_norm: float,
    flow: Flow,
    group_tokens: int,
    watch: Callable[[Sequence[Seen]], None] = unwatched,
    before: Callable[[], None] = nothing,
    enter: Enter = untold,
) -> Issued:
    """Gradients, one global norm, the guard's word, and the update of weights, optimizer state, their moving
    average and routers' buffers.

    Everything is asked of the device, and the host does not wait for it: where the guard refuses, every bit of the state stays
    (`state.step` and an optimizer's own counts are the host's to put right). An optimizer that cannot be refused on the device
    (`TrainState.guarded`) is waited for. `watch` is told what the microbatches were, `before` is called before anything
    changes, `enter` is told each phase as it begins; neither may wait for the device.
    """
    done = forward_backward(
        parallel.model, microbatches, flow=flow, group_tokens=group_tokens, parallel=parallel, enter=enter
    )
    enter("exchange")
    norm = parallel.clip(max_norm=max_norm)
    own = torch.stack([torch.stack(values).mean() for values in (done.losses, *done.auxiliary.values())])
    means = parallel.reduce(own, op="mean")
    finite = means.isfinite().all() & norm.isfinite().all()
    refuse, flags = guard.judge(loss=means[0], finite=finite, parallel=parallel)
    own_finite = own.isfinite().all().reshape(1)
    numbers = [means, norm.reshape(1), own_finite, flags, refuse.reshape(1)]
    issued = Issued(reading=Reading(torch.cat([n.to(means.dtype) for n in numbers])), auxiliary=tuple(done.auxiliary))
    watch(done.seen)
    before()
    enter("optimizer")
    if state.guarded:
        state.update(lr=lr, refuse=refuse)
        update_buffers(parallel, done.assignments, refuse=refuse)
    elif issued.numbers().applied:
        state.update(lr=lr, refuse=None)
        update_buffers(parallel, done.assignments)
    else:
        state.optimizer.zero_grad(set_to_none=True)
    return issued


@torch.no_grad()
def update_buffers(
    parallel: ParallelContext, assignments: list[tuple[Assignment, ...]], *, refuse: Tensor | None = None
) -> None:
    """Give each router what it observed, averaged over the step's microbatches and all ranks: the same bits everywhere,
    so that the copies of a buffer never drift apart. Nothing where no router observes anything, or where the device refuses."""
    routers = parallel.model.routers
    means = [
        {
            name: torch.stack([m[layer].observed[name] for m in assignments]).mean(0)
            for name in assignments[0][layer].observed
        }
        for layer in range(len(routers))
    ]
    tensors = [value.float() for layer in means for value in layer.values()]
    sizes = [t.numel() for t in tensors]
    agreed = iter(parallel.mean_of_first(torch.cat([t.flatten() for t in tensors])).split(sizes) if tensors else ())
    for router, layer in zip(routers, means, strict=True):
        kept = [] if refuse is None else [(buffer, buffer.clone()) for buffer in router.buffers()]
        router.update_buffers({name: next(agreed).view_as(value) for name, value in layer.items()})
        for buffer, old in kept:
            assert refuse is not None
            buffer.copy_(torch.where(refuse.ne(0), old, buffer))
