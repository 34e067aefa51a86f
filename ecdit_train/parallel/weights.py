"""Global values into local shards and back, by each parameter's placement."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecdit_train.model.init import initial_values, reset_buffers, slot_of

from .mesh import Mesh
from .placement import ParamPlacement, holds_first_copy, local, pieces


def fill(model: nn.Module, placements: Mapping[str, ParamPlacement], *, seed: int) -> None:
    """Initialise every shard with the values its box has in the global tensor, and every buffer: the same model on every layout.

    No rank makes more than it holds, and nothing is sent. A module with buffers must define `reset_buffers`
    (as `model.router.Router` does); one that does not is refused with TypeError, since its buffers would
    hold whatever memory held.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            placement = placements[name]
            for piece in pieces(p, placement):
                piece.view.copy_(
                    initial_values(
                        name,
                        seed=seed,
                        global_shape=placement.global_shape,
                        offsets=piece.box.offset,
                        sizes=piece.box.size,
                        device=p.device,
                        slot=slot_of(model, name),
                    )
                )
        reset_buffers(model)


def load_full(model: nn.Module, placements: Mapping[str, ParamPlacement], full_state: Mapping[str, Tensor]) -> None:
    """Copy each shard's box out of a whole state dict that every rank holds (tests, small models)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            for piece in pieces(p, placements[name]):
                piece.view.copy_(piece.box.of(full_state[name]))
        for name, buffer in model.named_buffers():
            for piece in pieces(buffer, placements[name]):
                piece.view.copy_(piece.box.of(full_state[name]))


def full_tensors(
    tensors: Mapping[str, Tensor], placements: Mapping[str, ParamPlacement], mesh: Mesh
) -> dict[str, Tensor]:
    """The global tensors of parameters, or of gradients or optimizer states with their placements. Collective.

    One rank of each set of copies writes its boxes into zeros, then all are added in one all-reduce: exact for every
    layout, at the price of the whole tensors (of one dtype) on every rank.
    """
    with torch.no_grad():
        first = local(next(iter(tensors.values())))
        sizes = [math.prod(placements[name].global_shape) for name in tensors]
        flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        full = {
            name: part.view(placements[name].global_shape)
            for name, part in zip(tensors, flat.split(sizes), strict=True)
        }
        for name, tensor in tensors.items():
            if holds_first_copy(tensor, placements[name]):
                for piece in pieces(tensor, placements[name]):
                    piece.box.of(full[name]).copy_(piece.view)
        if mesh.world_group is not None:
            dist.all_reduce(flat, group=mesh.world_group)
        return full


def full_tensor(tensor: Tensor, placement: ParamPlacement, mesh: Mesh) -> Tensor:
    """`full_tensors` for one tensor."""
    return full_tensors({"": tensor}, {"": placement}, mesh)[""]
