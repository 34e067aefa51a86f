"""The gradient of the whole model across both views of the ranks: how experts are scaled, one norm, clipping.

`torch.nn.utils.clip_grad_norm_` cannot be used: it refuses tensors of two meshes, and over the dense
part alone under tensor parallelism it returns a different wrong value on every tp rank, without an
error (pinned in tests/dist/test_dist_quirks.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import Mesh
from .placement import ParamPlacement, local

CLIP_EPS = 1e-6


def expert_gradient_divisor(mesh: Mesh) -> float:
    """What the sum of an expert's gradients over all ranks that sent it rows is divided by. The one place that says so.

    Each data-parallel rank's loss is the mean over its own tokens, and the global loss is the mean of those: every
    gradient is sum_d(dL_d) / dp. An expert has seen the rows of all ranks (its ep group in forward, the rest by the
    sum over edp), tp ranks having sent disjoint slots, so its sum is over all dp losses, once each: the divisor is
    dp, whatever ep and edp are.
    """
    return float(mesh.dp_size)


def global_norm(model: nn.Module, placements: Mapping[str, ParamPlacement], mesh: Mesh) -> Tensor:
    """L2 norm of the whole model's gradient: fp32 scalar on the device, the same bits on every rank. One all-reduce.

    Every element is counted once: shards are disjoint over dp_shard (dense) and over edp x ep (experts); what n ranks
    hold alike (tp replicas, repeated kv heads, hybrid sharding's copies, of experts where they have some) is divided by n.
    """
    shards: dict[int, list[Tensor]] = defaultdict(list)
    device = None
    for name, p in model.named_parameters():
        device = p.device
        if p.grad is not None:
            placement = placements[name]
            copies = placement.replicas * mesh.hybrid_copies(placement.kind)
            shards[copies].append(local(p.grad))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for copies, grads in sorted(shards.items()):
        norms = torch.stack(torch._foreach_norm(grads))
        total = total + norms.square().sum() / copies
    if mesh.world_group is not None:
        dist.all_reduce(total, group=mesh.world_group)
    return total.sqrt()


def clip(model: nn.Module, placements: Mapping[str, ParamPlacement], mesh: Mesh, *, max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before.

    Call it once a step, also with 0: it makes copies agree first. No host synchronization: the scale is a device
    scalar. A norm that is not finite is the caller's business.
    """
    agree(model, placements, mesh)
    norm = global_norm(model, placements, mesh)
    if max_norm > 0:
        scale = (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return norm


def agree(model: nn.Module, placements: Mapping[str, ParamPlacement], mesh: Mesh) -> None:
    """Give all tp ranks that hold the same values the same gradient bits: the first one's. In place; part of `clip`.

    They are equal in exact arithmetic, but attention's backward on CUDA uses atomics, and the data-parallel groups
    of two tp ranks may sum in different orders; a difference of one bit a step grows until the copies are different
    models. One broadcast of the replicated shards (a few per cent of a rank's gradient) per set of replicas.
    Nothing without tensor parallelism.
    """
    if mesh.tp_size == 1:
        return
    shards: dict[int, list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.grad is not None and placements[name].replicas > 1:
            shards[placements[name].replicas].append(local(p.grad))
    for replicas, grads in sorted(shards.items()):
        group = mesh.tp_part(replicas)
        assert group is not None
        flat = torch.cat([g.flatten() for g in grads])
        dist.broadcast(flat, group=group, group_src=0)
        for g, agreed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(agreed.view_as(g))
