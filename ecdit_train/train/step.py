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
from ecdit_train.errors import NonFiniteError
from ecdit_train.model.assignment import Assignment
from ecdit_train.model.dit import DiT
from ecdit_train.model.embed import Text, patchify, take_tokens
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.supervise.beats import Enter, untold


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Numbers of one step over all ranks."""

    loss: float
    auxiliary: Mapping[str, float]
    """Routers' auxiliary losses by name, weights included."""
    grad_norm: float
    """Before clipping."""
    applied: bool
    """Whether the update was made."""


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
    """What is known of a step before its update: over all ranks, `own_finite` aside."""

    loss: float
    auxiliary: Mapping[str, float]
    grad_norm: float
    own_finite: bool
    """Whether this rank's own losses are."""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, *self.auxiliary.values(), self.grad_norm)))

    def __str__(self) -> str:
        others = "".join(f", {n} loss {v}" for n, v in self.auxiliary.items() if not math.isfinite(v))
        return f"loss {self.loss}{others}, gradient norm {self.grad_norm}"


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


def only_finite(numbers: Numbers) -> bool:
    """The judge of a step that has nobody to ask. Raises NonFiniteError."""
    if not numbers.finite:
        raise NonFiniteError(f"{numbers}: the update was not applied")
    return True


def unwatched(seen: Sequence[Seen]) -> None:
    """The `watch` of a step that nobody looks at."""


def train_step(
    microbatches: list[Microbatch],
    *,
    parallel: ParallelContext,
    optimizer: torch.optim.Optimizer,
    lr: float,
    max_norm: float,
    flow: Flow,
    group_tokens: int,
    after: Callable[[], None],
    watch: Callable[[Sequence[Seen]], None] = unwatched,
    accept: Callable[[Numbers], bool] = only_finite,
    enter: Enter = untold,
) -> StepResult:
    """Gradients, one global norm, one look at the numbers, the update of weights and of routers' buffers, then
    `after` (the moving average).

    `accept` says whether the update is made; it must answer alike on all ranks. Where it says no, the state is what it
    was before the step, to the last bit. Reading the numbers is the step's only wait for the device. `enter` is told each
    phase as it begins, `watch` what the microbatches of an update that is made were, before it; it must not wait for the device.
    """
    done = forward_backward(
        parallel.model, microbatches, flow=flow, group_tokens=group_tokens, parallel=parallel, enter=enter
    )
    enter("exchange")
    norm = parallel.clip(max_norm=max_norm)
    own = torch.stack([torch.stack(values).mean() for values in (done.losses, *done.auxiliary.values())])
    means = parallel.reduce(own, op="mean")
    read = torch.cat([means, norm.reshape(1), own.isfinite().all().to(means.dtype).reshape(1)])
    loss_now, *auxiliary_now, norm_now, own_finite = read.tolist()
    auxiliary = dict(zip(done.auxiliary, auxiliary_now, strict=True))
    applied = accept(Numbers(loss=loss_now, auxiliary=auxiliary, grad_norm=norm_now, own_finite=bool(own_finite)))
    if applied:
        watch(done.seen)
        enter("optimizer")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        update_buffers(parallel, done.assignments)
    optimizer.zero_grad(set_to_none=True)
    if applied:
        after()
    return StepResult(loss=loss_now, auxiliary=auxiliary, grad_norm=norm_now, applied=applied)


@torch.no_grad()
def update_buffers(parallel: ParallelContext, assignments: list[tuple[Assignment, ...]]) -> None:
    """Give each router what it observed, averaged over the step's microbatches and all ranks: the same bits everywhere,
    so that the copies of a buffer never drift apart. Nothing where no router observes anything."""
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
        router.update_buffers({name: next(agreed).view_as(value) for name, value in layer.items()})
