"""One training problem small enough to run on one process and on many, and what is compared between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from dist_compare import Errors, compare, record_of
from dist_poisons import POISONS
from moe_configs import expert_race, selection
from plain_configs import PARALLEL, model_config
from torch import Tensor, nn

from ecdit_train.config.schema import ModelConfig, MoEConfig, ParallelConfig, Recipe
from ecdit_train.model.assignment import Rows, taken
from ecdit_train.model.dispatchers.index_add import IndexAdd
from ecdit_train.model.dit import DiT, Prediction
from ecdit_train.model.embed import Text
from ecdit_train.model.experts.gelu import Gelu
from ecdit_train.model.fp8 import remember
from ecdit_train.model.routers.expert_choice import ExpertChoice
from ecdit_train.model.routers.threshold import Threshold
from ecdit_train.model.routers.token_choice import TokenChoice
from ecdit_train.parallel.apply import full_tensor, full_tensors, load_full, parallelize
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.parallel.data_parallel import gather_over_dp
from ecdit_train.parallel.expert_parallel import sparse_layers
from ecdit_train.parallel.fsdp import accumulate
from ecdit_train.parallel.grads import clip, expert_gradient_divisor
from ecdit_train.parallel.low_precision import Fp8, apply_fp8
from ecdit_train.parallel.mesh import Mesh, make_mesh
from ecdit_train.parallel.owners import Sharding
from ecdit_train.parallel.placement import ParamPlacement, pieces
from ecdit_train.train.optimizers.muon import Muon
from ecdit_train.train.step import update_buffers

IMAGES, CHANNELS, SIDE, KEPT, TEXT_TOKENS, TEXT_FEATURES = 16, 4, 8, 8, 5, 24
NODE = 2
"""Ranks of a node, where the exchange is hierarchical."""
GROUP = 16
"""Two half-masked images."""
MAX_NORM = 0.01

MODEL = model_config(layers=4, width=32, heads=4, kv_heads=2)
EXPERT_CHOICE = ExpertChoice(capacity_factor=2.0, sees="modulated")
TOKEN_CHOICE_ROUTER = TokenChoice(capacity_factor=2.0, top_k=2, balance_weight=0.01, sees="modulated")
MOE = MoEConfig(
    router=EXPERT_CHOICE,
    experts=Gelu(),
    dispatcher=IndexAdd(cap=None),
    num_experts=8,
    scope="group",
    group_size=GROUP,
    layers="even",
    expert_ratio=None,
    form="plain",
    shared_experts=0,
)
TOKEN_CHOICE = replace(MOE, router=TOKEN_CHOICE_ROUTER)
DENSE = replace(MOE, router=None, experts=None, dispatcher=None)
THRESHOLD = replace(MOE, router=Threshold(capacity_factor=2.0, momentum=0.9, sees="modulated"))
"""A varying number of rows: counts first, then uneven exchange."""
CAPPED = replace(THRESHOLD, dispatcher=IndexAdd(cap=0.75))
"""The same under a static cap that drops some."""
RACE = replace(MOE, router=expert_race(capacity_factor=2.0))
"""Everything on all ranks competes; two losses and a buffer."""
FAMILY = {
    name: replace(MOE, router=selection(name, capacity_factor=2.0)) for name in ("ec_image", "bl", "be", "le", "tc")
}
MUON = Muon(
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    ns_coefficients=(3.4445, -4.7750, 2.0315),
    adjust_lr="match_rms_adamw",
    weight_decay=0.1,
    precision="fp32",
    modulation="muon",
    unnamed="refuse",
    adamw_lr_ratio=1.0,
    adamw_beta1=0.9,
    adamw_beta2=0.95,
    adamw_eps=1e-8,
    adamw_weight_decay=0.1,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout of one problem."""

    parallel: ParallelConfig = PARALLEL
    model: ModelConfig = MODEL
    moe: MoEConfig = MOE
    optim: Literal["rmsprop", "adamw", "muon"] = "rmsprop"
    precision: Literal["fp32", "bf16"] = "fp32"
    dtype: Literal["float32", "float64"] = "float64"
    """Of weights and data. float64 leaves so little rounding that any real fault stands out."""
    steps: int = 3
    microbatches: int = 1
    """Per step and data-parallel rank."""
    group_tokens: int = GROUP
    poison: str = ""
    fp8: Recipe | None = None
    """Products of 8-bit operands; sums and all the rest in `dtype`."""

    def __str__(self) -> str:
        p = self.parallel
        extra = [
            f"{k}={v}" for k, v in vars(self).items() if k not in ("parallel", "model", "moe") and v != getattr(BASE, k)
        ]
        extra += [
            f"{k}={v}"
            for k, v in vars(p).items()
            if k not in ("tp", "ep", "dp_replicate") and v != getattr(PARALLEL, k)
        ]
        if self.moe.router != EXPERT_CHOICE:
            extra.append(type(self.moe.router).__name__ + str(getattr(self.moe.router, "apart", "")))
        if self.moe.dispatcher != MOE.dispatcher:
            extra.append(str(self.moe.dispatcher))
        if self.moe.form != MOE.form:
            extra.append(self.moe.form)
        if self.moe.experts is not None and self.moe.experts != MOE.experts:
            extra.append(str(self.moe.experts))
        if self.model.kv_heads != MODEL.kv_heads:
            extra.append(f"kv={self.model.kv_heads}")
        return f"rep{p.dp_replicate} tp{p.tp} ep{p.ep} {' '.join(extra)}".strip()


BASE = Case()


def case(
    *,
    tp: int = 1,
    ep: int = 1,
    rep: int = 1,
    moe: MoEConfig = MOE,
    model: ModelConfig = MODEL,
    chunks: int = 1,
    ac: Any = "none",
    keep: Any = (),
    share: float = 1.0,
    reduce: Any = "step",
    reshard: Any = "all",
    replicate: bool = False,
    exchange: Any = "flat",
    compiled: bool = False,
    **rest: Any,
) -> Case:
    parallel = replace(
        PARALLEL,
        tp=tp,
        ep=ep,
        dp_replicate=rep,
        overlap_chunks=chunks,
        activation_checkpointing=ac,
        keep=keep,
        checkpoint_blocks=share,
        reduce_gradients=reduce,
        reshard_after_forward=reshard,
        replicate_experts=replicate,
        exchange=exchange,
        compile=compiled,
    )
    return Case(parallel=parallel, moe=moe, model=model, **rest)


@dataclass(kw_only=True)
class Trace:
    """What a run did, in global tensors."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    chosen: list[list[Tensor]] = field(default_factory=list)
    """Per step, per sparse layer: (groups, S, E), how often an expert took each token of a group."""
    records: list[dict[str, float]] = field(default_factory=list)
    """Per step, what a run would log of its losses by timestep and of its routing."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """After the last step."""
    copies_agree: bool = True
    """This rank's shards are the bits of the global tensors (which were gathered from one of each set of copies)."""


def make_model(c: Case) -> DiT:
    return DiT(c.model, c.moe, channels=CHANNELS, text_features=TEXT_FEATURES)


def how(c: Case) -> Fp8 | None:
    return None if c.fp8 is None else Fp8(recipe=c.fp8, backend="emulated")


def in_8_bits(c: Case, model: DiT) -> DiT:
    """As the case says, in one process."""
    if c.fp8 is not None:
        apply_fp8(model, how(c), mesh=make_mesh(PARALLEL, device_type="cpu", world=1))
    return model


def full_state(c: Case) -> dict[str, Tensor]:
    """Random weights everywhere: nothing that starts at zero may hide a wrong gradient."""
    with torch.device("meta"):
        model = in_8_bits(c, make_model(c))
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, p in model.named_parameters():
        fan_in = p.shape[1] if p.dim() > 1 else 16
        value = torch.randn(p.shape, generator=generator) / fan_in**0.5
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        state[name] = value.to(getattr(torch, c.dtype))
    for name, b in model.named_buffers():
        state[name] = torch.full(b.shape, 0.15, dtype=getattr(torch, c.dtype))
        if ".fp8." in name:  # as if all largest magnitudes had been up to 4 until now
            state[name] = torch.linspace(4, 1, b.numel()).view(b.shape)
    return state


def batch(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    parts = {
        "latents": torch.randn(IMAGES, CHANNELS, SIDE, SIDE, generator=g),
        "t": torch.rand(IMAGES, generator=g),
        "features": torch.randn(IMAGES, TEXT_TOKENS, TEXT_FEATURES, generator=g),
        "mask": torch.rand(IMAGES, TEXT_TOKENS, generator=g) < 0.7,
        "drop": torch.rand(IMAGES, generator=g) < 0.2,
        "keep": torch.rand(IMAGES, 16, generator=g).argsort(1)[:, :KEPT].sort(1).values,
        "target": torch.randn(IMAGES, KEPT, 4 * CHANNELS, generator=g),
    }
    parts["drop"][0] |= not parts["drop"].any()  # the null text has a gradient in every step
    return parts


def optimizer(c: Case, model: nn.Module, sharding: Sharding | None = None) -> torch.optim.Optimizer:
    if c.optim == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, eps=1e-6)
    if c.optim == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    return MUON.build(dict(model.named_parameters()), lr=1e-3, sharding=sharding)


def forward(model: DiT, part: dict[str, Tensor], *, group_tokens: int) -> tuple[Tensor, Prediction]:
    text = Text(features_BLX=part["features"], mask_BL=part["mask"], drop_B=part["drop"])
    out = model(part["latents"], t_B=part["t"], text=text, keep_BK=part["keep"], group_tokens=group_tokens)
    dtype = torch.promote_types(out.patches_BKP.dtype, torch.float32)

    def of(patches: Tensor) -> Tensor:
        return nn.functional.mse_loss(patches.to(dtype), part["target"].to(dtype))

    return sum(out.losses(of).values(), of(out.patches_BKP)), out


def chosen_in_group(prediction: Prediction) -> list[Tensor]:
    """Per layer (G, S, E): how often each expert took each token."""
    counts = []
    for a in prediction.assignments:
        G, S, E = a.probability_GSE.shape
        index, _, one = taken(a)
        if isinstance(a, Rows):
            expert = a.expert_R
        else:
            expert = torch.arange(E, device=index.device)[:, None].expand(E, len(index) // E).flatten()
        none = torch.zeros(G * S * E, dtype=torch.int64, device=index.device)
        counts.append(none.index_add(0, index * E + expert, one).view(G, S, E))
    return counts


def run_reference(c: Case) -> Trace:
    """One process, no parallel code at all; microbatches are only a loop order, so the whole batch is one forward."""
    form = "plain" if c.fp8 is None else c.moe.form  # in 8 bits the forms round other operands
    model = in_8_bits(c, make_model(replace(c, moe=replace(c.moe, form=form))).to(getattr(torch, c.dtype)))
    model.load_state_dict(full_state(c))
    optim, trace = optimizer(c, model), Trace()
    for step in range(c.steps):
        loss, prediction = forward(model, batch(step), group_tokens=c.group_tokens)
        loss.backward()
        trace.losses.append(loss.item())
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        for p in model.parameters():
            p.grad.mul_(min(1.0, MAX_NORM / (norm.item() + 1e-6)))
        trace.norms.append(norm.item())
        trace.grads.append(grads)
        trace.chosen.append(chosen_in_group(prediction))
        trace.records.append(record_of(model, [(batch(step), prediction)]))
        optim.step()
        optim.zero_grad()
        for router, a in zip(model.routers, prediction.assignments, strict=True):
            router.update_buffers({name: value.float() for name, value in a.observed.items()})
        remember(model, maximum=lambda vector: vector)
    trace.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    trace.buffers = {n: b.clone() for n, b in model.named_buffers()}
    return trace


def sharded(c: Case, mesh: Mesh) -> tuple[DiT, dict[str, ParamPlacement]]:
    """The network as this rank of the mesh has it, with the weights of `full_state`, and where they lie."""
    with torch.device("meta"):
        model = make_model(c).to(getattr(torch, c.dtype))
    placements = parallelize(model, mesh=mesh, parallel=c.parallel, precision=c.precision, fp8=how(c))
    model.to_empty(device=mesh.device_type)
    load_full(model, placements, full_state(c))
    return model, placements


def run_parallel(c: Case, mesh: Mesh) -> Trace:
    """The same problem on this mesh, and what it did, on the CPU."""
    model, placements = sharded(c, mesh)
    if c.dtype == "float64" and mesh.degrees.edp_shard == 1 and mesh.world > 1:
        # torch 2.13 treats float64 as it treats fp16, and then divides twice on a mesh of one (test_dist_quirks.py).
        # Production reduces in float32, where it divides once; the float32 cases cover that.
        for moe in sparse_layers(model).values():
            moe.experts.set_gradient_divide_factor(expert_gradient_divisor(mesh) ** 0.5)
    POISONS[c.poison](model, mesh)
    optim, trace = optimizer(c, model, Sharding(mesh=mesh, placements=placements)), Trace()
    context = ParallelContext(runtime=None, mesh=mesh, model=model, placements=placements)
    for step in range(c.steps):
        mine = {k: v.chunk(mesh.dp_size)[mesh.dp_rank].to(mesh.device_type) for k, v in batch(step).items()}
        losses, chosen, assignments, seen = [], [], [], []
        for m in range(c.microbatches):
            part = {k: v.chunk(c.microbatches)[m] for k, v in mine.items()}
            with accumulate(model, last=m == c.microbatches - 1, reduce=c.parallel.reduce_gradients):
                loss, prediction = forward(model, part, group_tokens=c.group_tokens)
                (loss / c.microbatches).backward()
            losses.append(loss.detach())
            chosen.append(chosen_in_group(prediction))
            assignments.append(prediction.assignments)
            seen.append((part, prediction))
        total = torch.stack(losses).mean()
        if mesh.dp_group is not None:
            dist.all_reduce(total, group=mesh.dp_group)
        trace.losses.append(total.item() / mesh.dp_size)
        grads = {n: p.grad for n, p in model.named_parameters()}
        trace.grads.append(on_cpu(full_tensors(grads, placements, mesh)))
        trace.copies_agree &= same_bits(grads, trace.grads[-1], placements)
        trace.norms.append(clip(model, placements, mesh, max_norm=MAX_NORM).item())
        trace.chosen.append([gather_over_dp(torch.cat(layer), mesh).cpu() for layer in zip(*chosen, strict=True)])
        trace.records.append(record_of(model, seen, context.reduce))
        optim.step()
        optim.zero_grad()
        update_buffers(context, assignments)
    trace.buffers = on_cpu({n: full_tensor(b, placements[n], mesh) for n, b in model.named_buffers()})
    trace.weights = on_cpu(full_tensors(dict(model.named_parameters()), placements, mesh))
    trace.copies_agree &= same_bits(dict(model.named_parameters()), trace.weights, placements)
    return trace


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def same_bits(tensors: dict[str, Tensor], full: dict[str, Tensor], placements: dict[str, ParamPlacement]) -> bool:
    """What this rank holds is what the gathered tensors say."""
    with torch.no_grad():
        return all(
            torch.equal(piece.view.cpu(), piece.box.of(full[n]))
            for n, t in tensors.items()
            for piece in pieces(t, placements[n])
        )


def check_cases(runtime: Any, cases: list[Case]) -> list[tuple[str, Errors]]:
    """All cases in turn, each against one process. Rank 0 knows the errors; every rank answers for its own copies."""
    results, references = [], {}
    for c in cases:
        mesh = make_mesh(c.parallel, device_type=runtime.device.type, world=runtime.world, gpus_per_node=NODE)
        trace = run_parallel(c, mesh)
        errors = None
        if runtime.rank == 0:
            key = repr(replace(c, parallel=PARALLEL, precision="fp32", microbatches=1, poison=""))
            if key not in references:
                references[key] = run_reference(c)
            errors = compare(trace, references[key])
        agree_everywhere = not any(runtime.any_rank(not trace.copies_agree))
        if errors is not None:
            results.append((str(c), replace(errors, copies_agree=agree_everywhere)))
    return results
