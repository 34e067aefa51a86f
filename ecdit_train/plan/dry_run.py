"""Dry run: the real model and the real parallelisation at the full world size, on one CPU process with fake tensors,
held against the formulas of the plan.

A fake process group answers for all other ranks and fake tensors have shapes but no memory, so 97 billion parameters
on 512 ranks take a minute and less than a gigabyte. A forward and a backward of rank 0, or two where a step has several,
run with every collective issued and logged; live bytes are tracked by category. What it does not see: values, compiled
graphs (blocks run in eager mode), NCCL and CUDA's allocator.

It owns the process group, so it needs a process of its own: `ecdit plan --dry-run`.
"""

from __future__ import annotations

import dataclasses
import resource
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit_train.config.convert import with_values
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, EcditError, Problem
from ecdit_train.kernels import gelu
from ecdit_train.model.embed import Text
from ecdit_train.parallel.apply import parallelize
from ecdit_train.parallel.expert_parallel import sparse_layers
from ecdit_train.parallel.fsdp import accumulate
from ecdit_train.parallel.low_precision import Fp8
from ecdit_train.parallel.mesh import make_mesh
from ecdit_train.parallel.owners import Sharding

from . import memory, slots, traffic
from . import parameters as parameters_
from .document import seconds, show, size, table
from .layout import resolve, units
from .plan import Plan

# --- what is sent ------------------------------------------------------------------------------------------------

_RULES = {
    "c10d::_allgather_base_": ("all_gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "c10d::allreduce_": ("all_reduce", 0, 1),
    "c10d::alltoall_base_": ("all_to_all", 1, 2),
    "_c10d_functional::all_reduce": ("all_reduce", 0, 2),
    "_c10d_functional::all_reduce_": ("all_reduce", 0, 2),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, 3),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0, 3),
    "c10d::allgather_": ("all_gather", 1, 2),
    "c10d::broadcast_": ("broadcast", 0, 1),
    "ecdit::expert_exchange": ("all_to_all", 0, 1),
    "ecdit::exchange_inside": ("all_to_all", 0, 1),
}
"""Op name -> kind, position of the full buffer (or list of buffers) and position of the group among the arguments."""

_OF_ONE_RANK = "_c10d_functional::all_gather_into_tensor"
"""Its argument is this rank's part: the full buffer is as many times larger."""

_NO_BYTES = {"_c10d_functional::wait_tensor", "c10d::barrier", "c10d::monitored_barrier_"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind over groups of one size; bytes of the full buffers, summed (as traffic.py counts them)."""

    kind: str
    ranks: int
    calls: int
    bytes: int


OF_ROUTERS = "routers' "
"""Before the kind of a collective that a router issues in its forward."""

OF_OPTIMIZER = "optimizer's "
"""The same in the optimizer's step."""

SENT_BY = {traffic.ROUTER_SELECTION: OF_ROUTERS, traffic.OPTIMIZER: OF_OPTIMIZER}
"""Purpose of a planned flow -> whose it is."""


class CollectiveLog(TorchDispatchMode):
    """Use as a context; groups of one rank are left out, because they send nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[tuple[str, int]] = Counter()
        self._bytes: Counter[tuple[str, int]] = Counter()
        self.whose = ""
        """Put before the kind, while a router's own forward runs or the optimizer's step: what they send is held
        against what they say (`RouterConfig.messages`, `OptimizerConfig.step_traffic`)."""
        self.unknown: Counter[str] = Counter()
        """Collectives that the table does not know; a dry run refuses to compare while there are any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _RULES:
            kind, buffer, group = _RULES[name]
            kind = f"{self.whose}{kind}"
            ranks = _size(args[group])
            if ranks > 1:
                self._calls[kind, ranks] += 1
                self._bytes[kind, ranks] += _nbytes(args[buffer]) * (ranks if name == _OF_ONE_RANK else 1)
        elif "c10d" in name and name not in _NO_BYTES:
            self.unknown[name] += 1
        return func(*args, **(kwargs or {}))

    def collectives(self) -> tuple[Collective, ...]:
        """Everything seen, sorted by kind and group size."""
        return tuple(
            Collective(kind=kind, ranks=ranks, calls=calls, bytes=self._bytes[kind, ranks])
            for (kind, ranks), calls in sorted(self._calls.items())
        )


def _size(group: Any) -> int:
    """Ranks of a group that an op names by a string or carries as an object."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
    return (group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)).size()


def _nbytes(buffer: Any) -> int:
    tensors = [buffer] if isinstance(buffer, Tensor) else buffer
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


SMALL = 1 << 28
"""Bytes of sharded parameters up to which an update that says it sends nothing is run all the same."""


# --- one microbatch ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What rank 0 did in one microbatch, or in two where a step has several; bytes."""

    world: int
    microbatches: int
    collectives: tuple[Collective, ...]
    parameters: int
    """Sharded fp32 parameters."""
    gradients: int
    """Sharded gradients after backward."""
    optimizer: int
    """Its state."""
    gathered: int
    """Compute copies that are alive between forward and backward."""
    activations_kept: int
    """Alive between forward and backward."""
    peak: int
    """Most bytes alive at once in forward and backward; optimizer state, average and encoders are not there."""
    peak_parts: dict[str, int]
    """The same by torch's categories."""
    seconds: float
    resident: int
    """Memory that this process itself needed."""


def dry_run(cfg: RunConfig, *, world: int) -> DryRun:
    """Run a microbatch or two of `cfg` on rank 0 of `world` fake ranks. Blocks run in eager
    mode whatever `parallel.compile` says.

    Raises:
        ConfigError: the layout does not fit `world`, or `world` is 1 (nothing is parallel then).
        EcditError: the process already has a process group.
    """
    if world < 2:
        raise ConfigError(Problem(field="world", value=world, rule="a dry run needs at least two ranks", nearest=2))
    if dist.is_initialized():
        raise EcditError("a dry run owns the process group: start it in a process of its own")
    layout = resolve(cfg, world=world)
    said = traffic.update(cfg, parameters_.count(cfg), layout)
    started = time.monotonic()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with _as_on_a_gpu():
            return _run(cfg, world=world, started=started, said=said, microbatches=min(layout.microbatches, 2))
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Activations of the lean form in large tiles: in those of a CPU's cache fake tensors would take hours, in one their fp32
    copies, which no GPU makes, would weigh most."""
    kept, gelu.TILE = gelu.TILE, 1 << 22
    try:
        yield
    finally:
        gelu.TILE = kept


def _run(cfg: RunConfig, *, world: int, started: float, said: traffic.Update, microbatches: int) -> DryRun:
    parallel = dataclasses.replace(cfg.parallel, compile=False)
    if cfg.capacity is None and cfg.moe.dispatcher is not None and cfg.moe.dispatcher.cap is None:
        # Fake tensors do not know how many rows there are: run the number that is expected.
        cfg = with_values(cfg, {"moe.dispatcher.cap": 1.0})
    mesh = make_mesh(parallel, device_type="cpu", world=world, gpus_per_node=cfg.cluster.gpus_per_node)
    model = slots.network(cfg)
    fp8 = Fp8.of(cfg.train)
    if fp8 is not None and fp8.backend == "transformer_engine":
        # It knows no fake tensors. With blocks the emulation keeps a float for each number, it a byte for 32 of them.
        fp8 = Fp8(recipe="current" if fp8.recipe == "mxfp8" else fp8.recipe, backend="emulated")
    placements = parallelize(model, mesh=mesh, parallel=parallel, precision=cfg.train.compute, fp8=fp8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        batch = _batch(cfg)
        tracker, log = FSDPMemTracker(model), CollectiveLog()
        tracker.track_inputs((batch["latents_BCHW"], batch["text"].features_BLX))
        for moe in sparse_layers(model).values():
            moe.router.register_forward_pre_hook(lambda *_: setattr(log, "whose", OF_ROUTERS))
            moe.router.register_forward_hook(lambda *_: setattr(log, "whose", ""))
        with tracker, log:
            for number in range(microbatches):
                tracker.reset_mod_stats()  # each module is entered once in its life
                with accumulate(model, last=number == microbatches - 1, reduce=parallel.reduce_gradients):
                    prediction = model(**batch, group_tokens=cfg.group_tokens)
                    after_forward = _snapshot(tracker, "current")
                    loss = prediction.patches_BKP.float().square().mean()
                    sum(prediction.losses(lambda y: y.float().square().mean()).values(), loss).backward()
                    del prediction, loss
        if log.unknown:
            raise AssertionError(f"collectives without a rule: {dict(log.unknown)}")
        peak, after_backward = _snapshot(tracker, "peak"), _snapshot(tracker, "current")
    # Outside of the mode: its counters are real numbers then, which optimizers read.
    sharding = Sharding(mesh=mesh, placements=placements)
    optimizer = cfg.optim.optimizer.build(dict(model.named_parameters()), lr=cfg.optim.lr, sharding=sharding)
    log.whose = OF_OPTIMIZER
    if said.calls or after_forward["Sharded Param"] <= SMALL:
        with log, warnings.catch_warnings():
            # Optimizers that work block by block make sure of views by addresses, which fake tensors have, if only with a warning.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            optimizer.step()
    return DryRun(
        world=world,
        microbatches=microbatches,
        collectives=log.collectives(),
        parameters=after_forward["Sharded Param"],
        gradients=after_backward["Sharded Grad"],
        optimizer=_state_bytes(optimizer),
        gathered=after_forward["Unsharded Param"],
        activations_kept=after_forward["Activation"],
        peak=peak.pop("Total"),
        peak_parts=peak,
        seconds=time.monotonic() - started,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _batch(cfg: RunConfig) -> dict[str, Any]:
    """Arguments of the network for one microbatch; shapes and types as the training step makes them."""
    images, tokens, side = cfg.train.microbatch, slots.text_tokens(cfg), cfg.latent_side
    whole = cfg.tokens_per_image == cfg.patches_per_image
    return {
        "latents_BCHW": torch.empty(images, slots.latent_channels(cfg), side, side),
        "t_B": torch.empty(images),
        "text": Text(
            features_BLX=torch.empty(images, tokens, slots.text_features(cfg)),
            mask_BL=torch.empty(images, tokens, dtype=torch.bool),
            drop_B=torch.empty(images, dtype=torch.bool),
        ),
        "keep_BK": None if whole else torch.empty(images, cfg.tokens_per_image, dtype=torch.int64),
    }


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state that this rank holds; counters (no dimension) are left out."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def _snapshot(tracker: FSDPMemTracker, moment: str) -> dict[str, int]:
    """Bytes by torch's category, summed over devices."""
    out: dict[str, int] = {}
    for parts in tracker.get_tracker_snapshot(moment).values():  # type: ignore[arg-type]
        for key, value in parts.items():
            name = str(getattr(key, "value", key))
            out[name] = out.get(name, 0) + int(value)
    return out


# --- against the formulas ----------------------------------------------------------------------------------------


TOLERANCE = 0.10
"""A formula may be this far from the dry run, relative."""

AFTER_BACKWARD = ("broadcast",)
"""Kinds that only clipping issues (parallel/grads.agree): a dry run ends with backward, so there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity, computed twice; bytes of one rank."""

    name: str
    formula: float
    measured: float

    @property
    def relative(self) -> float:
        """formula / measured - 1; 0 where both are nothing."""
        if not self.measured:
            return 0.0 if not self.formula else float("inf")
        return self.formula / self.measured - 1

    @property
    def within(self) -> bool:
        return abs(self.relative) <= TOLERANCE


def compare(plan: Plan, ran: DryRun) -> tuple[Difference, ...]:
    """Collectives by kind (without AFTER_BACKWARD), then memory by part. The formulas are asked about as many
    microbatches as were run."""
    cfg, parameters = plan.cfg, plan.parameters
    layout = dataclasses.replace(plan.cost.layout, microbatches=ran.microbatches)
    flows = [flow for flow in traffic.per_step(cfg, parameters, layout) if flow.kind not in AFTER_BACKWARD]
    planned: dict[str, float] = defaultdict(float)
    for flow in flows:
        planned[f"{SENT_BY.get(flow.purpose, '')}{flow.kind}"] += flow.message
    kinds = sorted({*planned, *(c.kind for c in ran.collectives)})
    sent = {kind: float(sum(c.bytes for c in ran.collectives if c.kind == kind)) for kind in kinds}
    rows = [Difference(name=kind, formula=planned[kind], measured=sent[kind]) for kind in kinds]
    m = memory.estimate(cfg, parameters, layout)
    running = m.parameters + m.gradients + m.gathered + m.communication + m.activations - m.never_together
    every = units(cfg, parameters, layout)
    between = sum(unit.count * unit.gathered_bytes for unit in every if not unit.freed)
    shards = memory.GRADIENT * sum(unit.held for unit in every)  # whatever adds up before, shards are left
    pairs = (
        ("parameters", m.parameters, ran.parameters),
        ("gradients", shards, ran.gradients),
        ("optimizer", m.optimizer, ran.optimizer),
        ("gathered between forward and backward", between, ran.gathered),
        ("activations kept", memory.activations(cfg, layout).kept, ran.activations_kept),
        ("peak of forward and backward", running, ran.peak),
    )
    return (*rows, *(Difference(name=name, formula=formula, measured=measured) for name, formula, measured in pairs))


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A dry run held against its plan."""

    document: dict[str, Any]
    """Plain values: {"dry_run": {...}, "differences": [{name, formula, measured, relative, within}]}."""
    text: str
    within: bool
    """Whether every formula is within TOLERANCE of the dry run."""


def check(plan: Plan) -> Checked:
    """Dry-run what was planned and compare; errors as in `dry_run`."""
    ran = dry_run(plan.cfg, world=plan.cost.layout.world)
    rows = compare(plan, ran)
    differences = [{**dataclasses.asdict(row), "relative": row.relative, "within": row.within} for row in rows]
    return Checked(
        document={"dry_run": dataclasses.asdict(ran), "differences": differences},
        text=render(ran, rows),
        within=all(row.within for row in rows),
    )


def render(ran: DryRun, rows: tuple[Difference, ...]) -> str:
    """Verdict first, then formula and dry run side by side."""
    off = [row.name for row in rows if not row.within]
    verdict = f"formulas off by more than {TOLERANCE:.0%}: {', '.join(off)}" if off else f"all within {TOLERANCE:.0%}"
    cells = [(r.name, size(r.formula), size(r.measured), f"{r.relative:+.1%}") for r in rows]
    return show(
        [
            f"dry run of rank 0 of {ran.world}, {'one microbatch' if ran.microbatches == 1 else 'two microbatches'}: {verdict} "
            f"({seconds(ran.seconds)}, {size(ran.resident)} of memory)"
        ],
        {"formula and dry run": [table(cells, header=("", "formula", "dry run", "off"))]},
    )
