"""All parallelism in one call and one fixed order: tensor -> fp8 -> expert -> compile -> activation checkpointing -> FSDP."""

from __future__ import annotations

from ecdit_train.config.schema import ParallelConfig
from ecdit_train.model.dit import DiT

from .activation import apply_activation_checkpointing, mark_kept
from .compiling import apply_compile
from .expert_parallel import apply_expert_parallel
from .fsdp import Precision, apply_fsdp, needs_fsdp
from .low_precision import Fp8, apply_fp8
from .low_precision import place as place_fp8
from .mesh import Mesh
from .placement import ParamPlacement
from .runtime import ensure_group
from .tensor_parallel import apply_tensor_parallel
from .weights import fill, full_tensor, full_tensors, load_full

__all__ = ["fill", "full_tensor", "full_tensors", "load_full", "parallelize"]


def parallelize(
    model: DiT, *, mesh: Mesh, parallel: ParallelConfig, precision: Precision, fp8: Fp8 | None = None
) -> dict[str, ParamPlacement]:
    """Spread a model (normally on the meta device) over the mesh, in place. Collective when world > 1.

    Returns where each parameter and buffer of this rank lies in the global tensor, by its unchanged name. Afterwards the caller
    gives it storage (`model.to_empty(device=...)`) and values (`fill`, or a checkpoint). Raises ConfigError for sizes
    that do not divide. `precision` is that of activations and gathered weights; `fp8` that of products, in 8 bits if given.

    The order matters: tensor and expert parallelism replace modules, so the rest sees the final ones; fp8 comes between them, since
    experts cut what it remembers of each of them; checkpointing
    goes around compiled code, because neither FSDP's hooks inside a block nor our selective modes can be traced into
    it; FSDP, which hooks into what it finds, comes last.
    """
    shapes = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
    scalars = [name for name, p in model.named_parameters() if p.dim() == 0]
    if scalars:
        raise TypeError(f"{', '.join(scalars)}: a parameter without dims cannot be sharded; make it of shape (1,)")
    split = apply_tensor_parallel(model, mesh=mesh)
    if fp8 is not None:
        apply_fp8(model, fp8, mesh=mesh)
        shapes |= {name: tuple(b.shape) for name, b in model.named_buffers() if name not in shapes}
    split |= apply_expert_parallel(model, mesh=mesh, overlap_chunks=parallel.overlap_chunks)
    if fp8 is not None:
        place_fp8(model, mesh=mesh)
    share = parallel.checkpoint_blocks
    mark_kept(model, keep=parallel.keep, share=share)
    if parallel.compile:
        apply_compile(model, keep=parallel.keep, share=share)
    apply_activation_checkpointing(model, mode=parallel.activation_checkpointing, share=share)
    if needs_fsdp(mesh, precision):
        ensure_group(mesh.device_type)
        mesh.build()
        apply_fsdp(model, mesh=mesh, precision=precision, reshard_after_forward=parallel.reshard_after_forward)
    parameters = {name for name, _ in model.named_parameters()}
    whole = {
        name: ParamPlacement(
            global_shape=shape,
            # FSDP shards parameters; buffers are whole on every rank.
            replicas=mesh.tp_size if name in parameters else mesh.world,
            first_replica=(mesh.tp_rank if name in parameters else mesh.rank) == 0,
        )
        for name, shape in shapes.items()
        if name not in split
    }
    placements = split | whole
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert placements.keys() == named, "a parameter or buffer changed its name"
    return placements
