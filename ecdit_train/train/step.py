"""One optimizer step. The only file that decides what a step is.

Legend: B images of one microbatch, C channels, H W latent height and width, K kept patches, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ecdit_train.diffusion.flow import Flow, interpolate
from ecdit_train.errors import NonFiniteError
from ecdit_train.model.embed import Text, patchify, take_tokens
from ecdit_train.model.router import Assignment


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What the network trains on, on the device."""

    position_B: Tensor
    """Global positions of the samples in the training stream, int64; they key every random draw."""
    latents_BCHW: Tensor
    features_BLX: Tensor
    mask_BL: Tensor


class Spread(Protocol):
    """What the step asks of the way the model is spread over ranks (`parallel` answers; one process does too)."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced over ranks only in the last microbatch."""
        ...

    def clip(self, *, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most `max_norm`; returns the norm before, equal on all ranks."""
        ...

    def reduce(self, vector: Tensor, *, op: Literal["mean", "max", "sum"]) -> Tensor:
        """The vector reduced over data-parallel ranks, the same on every rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    balance_loss: float | None
    """None for a router without one."""
    grad_norm: float
    assignments: tuple[Assignment, ...]
    """Of the last microbatch on this rank; device tensors."""


def forward_backward(
    model: nn.Module, microbatches: list[Microbatch], *, flow: Flow, pool: int, patch: int, spread: Spread
) -> tuple[Tensor, Tensor, tuple[Assignment, ...]]:
    """Accumulate the gradients of the mean loss over all microbatches; nothing here waits for the device.

    Returns the mean loss and balance loss of this rank (device scalars) and the last microbatch's assignments.
    """
    num = len(microbatches)
    losses, balances, assignments = [], [], ()
    for n, micro in enumerate(microbatches):
        _, C, H, W = micro.latents_BCHW.shape
        draws = flow.draw(micro.position_B, shape=(C, H, W))
        x_t = interpolate(micro.latents_BCHW, draws.eps_BCHW, draws.t_B)
        text = Text(features_BLX=micro.features_BLX, mask_BL=micro.mask_BL, drop_B=draws.drop_B)
        with spread.accumulate(last=n == num - 1):
            prediction = model(x_t, t_B=draws.t_B, text=text, keep_BK=draws.keep_BK, pool=pool)
            x_BKP, eps_BKP = (patchify(z, patch=patch) for z in (micro.latents_BCHW, draws.eps_BCHW))
            if draws.keep_BK is not None:
                x_BKP, eps_BKP = take_tokens(x_BKP, draws.keep_BK), take_tokens(eps_BKP, draws.keep_BK)
            loss = flow.loss(prediction.patches_BKP, x_BKP=x_BKP, eps_BKP=eps_BKP, t_B=draws.t_B)
            balance = prediction.balance_loss if prediction.balance_loss is not None else torch.zeros_like(loss)
            ((loss + balance) / num).backward()
        losses.append(loss.detach())
        balances.append(balance.detach())
        assignments = prediction.assignments
    return torch.stack(losses).mean(), torch.stack(balances).mean(), assignments


def train_step(
    microbatches: list[Microbatch],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    max_norm: float,
    flow: Flow,
    pool: int,
    patch: int,
    spread: Spread,
    after: Callable[[], None],
) -> StepResult:
    """Gradients, one global norm, one look at the numbers, the update, then `after` (the moving average).

    Raises NonFiniteError before the update when the loss or the norm is not finite, on every rank alike: both numbers
    are already global. Reading them is the step's only wait for the device.
    """
    loss, balance, assignments = forward_backward(model, microbatches, flow=flow, pool=pool, patch=patch, spread=spread)
    norm = spread.clip(max_norm=max_norm)
    means = spread.reduce(torch.stack([loss, balance]), op="mean")
    loss_now, balance_now, norm_now = torch.cat([means, norm.reshape(1)]).tolist()
    if not all(map(_finite, (loss_now, norm_now))):
        raise NonFiniteError(f"loss {loss_now}, gradient norm {norm_now}: the update was not applied")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after()
    balanced = any(a.balance_loss is not None for a in assignments)
    return StepResult(
        loss=loss_now, balance_loss=balance_now if balanced else None, grad_norm=norm_now, assignments=assignments
    )


def _finite(x: float) -> bool:
    return abs(x) < float("inf")


def split(batch: Microbatch, *, size: int) -> Iterator[Microbatch]:
    """A rank's share of the global batch, cut into microbatches of `size` consecutive images (whole routing groups)."""
    for start in range(0, len(batch.position_B), size):
        part = slice(start, start + size)
        yield Microbatch(
            position_B=batch.position_B[part],
            latents_BCHW=batch.latents_BCHW[part],
            features_BLX=batch.features_BLX[part],
            mask_BL=batch.mask_BL[part],
        )
