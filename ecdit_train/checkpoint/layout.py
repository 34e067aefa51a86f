"""What a rank tells a checkpoint about a tensor: its global shape and dtype, and which boxes of it are here.

Where the boxes lie is `parallel.placement`'s arithmetic; here is what may be stored at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import ParamPlacement, Piece, local, pieces

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
"""The dtypes a checkpoint may hold, by the name written in the manifest."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A local tensor or FSDP2 DTensor together with its place in the global tensor."""

    tensor: torch.Tensor
    placement: ParamPlacement


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """One tensor as a rank sees it: what it is globally, and which boxes are here (none is fine)."""

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


Value = torch.Tensor | Placed | TensorSlice
"""What `save` and `load` take by name: whole tensors, FSDP2 DTensors, placed tensors, or ready slices."""


def describe_all(tensors: Mapping[str, Value]) -> list[TensorSlice]:
    """Slices in name order. Raises CheckpointError listing every tensor that cannot be described."""
    slices, problems = [], []
    for name in sorted(tensors):
        try:
            slices.append(describe(name, value=tensors[name]))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return slices


class Memo:
    """The slices of the last save, which are those of the next one as long as every tensor lies where it lay."""

    def __init__(self) -> None:
        self._places: list[object] = []
        self._held: dict[str, Value] = {}
        """What the places are of: while it lives, nothing else can lie there."""
        self._slices: list[TensorSlice] = []

    def describe_all(self, tensors: Mapping[str, Value]) -> list[TensorSlice]:
        """As `describe_all`."""
        with torch.no_grad():
            places = [_place(name, value=tensors[name]) for name in sorted(tensors)]
        if places != self._places:
            self._slices = describe_all(tensors)
            self._places, self._held = places, dict(tensors)
        return self._slices


def _place(name: str, *, value: Value) -> object:
    """All that a description depends on; equal to nothing where there is no memory."""
    if isinstance(value, TensorSlice):
        return name, id(value)
    tensor, placement = (value.tensor, id(value.placement)) if isinstance(value, Placed) else (value, None)
    here = local(tensor)
    if here.layout != torch.strided or here.is_meta:
        return object()
    return name, placement, tensor.shape, here.data_ptr(), here.shape, here.stride(), here.dtype, here.device


def describe(name: str, *, value: Value) -> TensorSlice:
    """The slice of one tensor on this rank; views share memory with `value`. Raises CheckpointError.

    An FSDP2 module must be in its sharded state: take parameters from `model.state_dict()`, not from a forward.
    """
    if isinstance(value, TensorSlice):
        _check_slice(value, name=name)
        return value
    placement = value.placement if isinstance(value, Placed) else None
    tensor = value.tensor if isinstance(value, Placed) else value
    with torch.no_grad():
        _check_storage(local(tensor), name=name)
    try:
        here = pieces(tensor, placement)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    shape = tuple(tensor.shape) if placement is None else tuple(placement.global_shape)
    return TensorSlice(name=name, global_shape=shape, dtype=tensor.dtype, pieces=tuple(here))


def _check_storage(tensor: torch.Tensor, *, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{name}: only dense tensors with storage can be saved or loaded (this is {tensor.layout})"
        )
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(f"{name}: dtype {tensor.dtype} has no place in a checkpoint; known: {', '.join(DTYPES)}")


def _check_slice(value: TensorSlice, *, name: str) -> None:
    if value.name != name or value.dtype not in DTYPES.values():
        raise CheckpointError(f"{name}: slice is named {value.name!r} with dtype {value.dtype}")
    for piece in value.pieces:
        fits = len(piece.box.offset) == len(piece.box.size) == len(value.global_shape) and all(
            o >= 0 and n > 0 and o + n <= length
            for o, n, length in zip(piece.box.offset, piece.box.size, value.global_shape, strict=True)
        )
        if not fits or tuple(piece.view.shape) != piece.box.size or piece.view.dtype != value.dtype:
            raise CheckpointError(f"{name}: box {piece.box} does not fit {value.global_shape} or its view")
