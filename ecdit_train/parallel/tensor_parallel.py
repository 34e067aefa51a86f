"""Tensor parallelism, applied from outside with Megatron-core's column and row layers. The only importer of megatron.

Megatron lends `ColumnParallelLinear` and `RowParallelLinear` with an explicit group; none of its global state is
initialised. It is imported inside functions because importing it costs seconds, and runs without tensor
parallelism never need it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecdit_train.model.attention import Attention
from ecdit_train.model.dit import DiT

from .collectives import copy_to_group, sum_over_group
from .mesh import Mesh
from .placement import ParamPlacement

Split = Literal["column", "row"]
TextFeatures = tuple[Tensor, Tensor, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]
"""(input (..., K), weight (O, K)) -> (..., O)."""

PLAN: tuple[tuple[str, Split], ...] = (
    (r"blocks\.\d+\.self_attention\.(query|key|value)", "column"),
    (r"blocks\.\d+\.self_attention\.out", "row"),
    (r"blocks\.\d+\.cross_attention\.(query|key|value)", "column"),
    (r"blocks\.\d+\.cross_attention\.out", "row"),
    (r"blocks\.\d+\.feed_forward\.(shared\.)?(up|gate)", "column"),
    (r"blocks\.\d+\.feed_forward\.(shared\.)?down", "row"),
)
"""Module path -> how its matrix is split; in a sparse block only `feed_forward.shared`, the shared experts, is met.

Everything else is replicated: AdaLN projections, timestep and pooled text see one vector per image, the text
refiner runs once and not per block, the patch embedding and the output layer are small, the router must see all
tokens. Splitting them would save only memory, which FSDP saves already. Experts are spread by expert parallelism,
folded over this axis."""


def split_of(path: str) -> Split | None:
    """How the linear layer at `path` is split."""
    return next((split for pattern, split in PLAN if re.fullmatch(pattern, path)), None)


def apply_tensor_parallel(model: DiT, *, mesh: Mesh) -> dict[str, ParamPlacement]:
    """Replace the layers of PLAN in place (meta or real device, weights left unset) and say where each weight lies.

    That sizes divide is a rule of the configuration (config/layout.py); Megatron's layers assert it."""
    if mesh.tp_size == 1:
        return {}
    placements: dict[str, ParamPlacement] = {}
    for path, module in list(model.named_modules()):
        split = split_of(path)
        if split is None or not isinstance(module, nn.Linear):
            continue
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if isinstance(parent, Attention) and name in ("key", "value"):
            layer, placements[f"{path}.weight"] = _kv(module, parent, mesh=mesh)
        elif split == "column":
            layer, placements[f"{path}.weight"] = _column(module, mesh=mesh)
        else:
            layer, placements[f"{path}.weight"] = _row(module, mesh=mesh)
        setattr(parent, name, layer)
        if split == "row":
            # One row layer closes each region; its parent is where the inputs enter.
            # The text enters all blocks as one tensor: it is copied where it is made, once a step and not once a block.
            once = ("context",) if parent_path.endswith(".cross_attention") else ()
            enter = functools.partial(_enter, group=mesh.tp_group, entered=once)
            parent.register_forward_pre_hook(enter, with_kwargs=True)
    model.text.register_forward_hook(functools.partial(_text_enters, group=mesh.tp_group))
    return placements


def _text_enters(module: nn.Module, args: Any, made: TextFeatures, *, group: dist.ProcessGroup | None) -> TextFeatures:
    """Copy what the blocks' cross-attentions read to the group. The mean over tokens is no part of it: what it leads to is
    computed alike on all ranks."""
    text_BLY, mask_BL, mean_BY = made
    return copy_to_group(text_BLY, group), mask_BL, mean_BY


def _enter(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    group: dist.ProcessGroup | None,
    entered: Collection[str],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy each floating input of a region to the group once: one all-reduce in backward per
    input, not per projection. Keywords in `entered` are copied already."""
    copies: list[tuple[Tensor, Tensor]] = []

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for original, made in copies:
            if original is value:  # self-attention: queries and context are one tensor
                return made
        copies.append((value, copy_to_group(value, group)))
        return copies[-1][1]

    return tuple(copy(a) for a in args), {k: v if k in entered else copy(v) for k, v in kwargs.items()}


def _column(linear: nn.Linear, *, mesh: Mesh) -> tuple[nn.Module, ParamPlacement]:
    out, width = linear.out_features, linear.in_features
    placement = ParamPlacement(global_shape=(out, width), dim=0, index=mesh.tp_rank, count=mesh.tp_size, kind="column")
    return _layers().column(width, out, linear=linear, group=mesh.tp_group, shared=None), placement


def _row(linear: nn.Linear, *, mesh: Mesh) -> tuple[nn.Module, ParamPlacement]:
    out, width = linear.out_features, linear.in_features
    placement = ParamPlacement(global_shape=(out, width), dim=1, index=mesh.tp_rank, count=mesh.tp_size, kind="row")
    return _layers().row(width, out, linear=linear, group=mesh.tp_group), placement


def _kv(linear: nn.Linear, attention: Attention, *, mesh: Mesh) -> tuple[nn.Module, ParamPlacement]:
    """Key or value projection. With more ranks than kv heads, `tp / kv_heads` neighbours hold the same head."""
    kv_heads = linear.out_features // attention.head_dim
    if kv_heads % mesh.tp_size == 0:
        return _column(linear, mesh=mesh)
    share, head_dim, width = mesh.tp_size // kv_heads, attention.head_dim, linear.in_features
    head = mesh.tp_rank // share
    placement = ParamPlacement(
        global_shape=(linear.out_features, width),
        dim=0,
        boxes=((head * head_dim, 0, head_dim),),
        kind="column",
        replicas=share,
        first_replica=mesh.tp_rank % share == 0,
    )
    # As a column layer of tp heads: each rank's part is one head.
    return _layers().column(
        width, mesh.tp_size * head_dim, linear=linear, group=mesh.tp_group, shared=mesh.tp_part(share)
    ), placement


@functools.cache
def _layers() -> Any:
    """Megatron's layers, with a forward that returns the tensor alone, so that they take an
    nn.Linear's place by name."""
    with warnings.catch_warnings():
        # Four lines on every rank about optimizers of Megatron's that are not used here.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    def config(size: int, dtype: torch.dtype) -> Any:
        # use_cpu_initialization: the GPU path names the current device and would override a meta context.
        # perform_initialization=False: Megatron would build the full matrix on every rank; `fill` writes this rank's
        # box.
        return ModelParallelConfig(
            tensor_model_parallel_size=size,
            use_cpu_initialization=True,
            params_dtype=dtype,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
        )

    class Part(nn.Module):
        """What the two have in common: built where the linear layer's weight is, without a bias; `product` in place of Megatron's
        own, which differs in what happens to gradients on the way, none of which is asked for here."""

        product: Product | None = None
        weight: nn.Parameter
        tp_group: dist.ProcessGroup

        def __init__(self, width: int, out: int, *, linear: nn.Linear, group: dist.ProcessGroup, **how: bool) -> None:
            like = config(group.size(), linear.weight.dtype)
            with linear.weight.device:
                super().__init__(
                    width, out, config=like, init_method=nn.init.xavier_uniform_, bias=False, tp_group=group, **how
                )

        def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.product is not None:
                return self.product(input, weight)
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc, operator]

    class Column(Part, ColumnParallelLinear):
        """Y_r = X W_r^T. `shared`: ranks that hold the same W_r because kv heads are repeated."""

        def __init__(self, width: int, out: int, *, shared: dist.ProcessGroup | None, **about: Any) -> None:
            # disable_grad_reduce: the region's inputs are copied to the group once, by _enter.
            super().__init__(width, out, gather_output=False, disable_grad_reduce=True, **about)
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            # Each rank's query heads give a part of the shared head's gradient: sum it, or the copies drift apart.
            weight = None if self.shared is None else copy_to_group(self.weight, self.shared)
            return super().forward(x, weight=weight)[0]

    class Row(Part, RowParallelLinear):
        """Y = sum_r X_r W_r^T. Megatron sums in place, on top of the product, which then cannot be kept for backward; `keeps_sum`:
        into memory of its own, which is kept (parallel/activation.py)."""

        keeps_sum = False

        def __init__(self, width: int, out: int, **about: Any) -> None:
            super().__init__(width, out, input_is_parallel=True, skip_bias_add=False, **about)

        def forward(self, x: Tensor) -> Tensor:
            if self.keeps_sum:
                product = self.product or nn.functional.linear
                return sum_over_group(product(x, self.weight), self.tp_group)
            return super().forward(x)[0]

    return SimpleNamespace(column=Column, row=Row)
