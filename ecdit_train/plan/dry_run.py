"""Dry run: the real model and the real parallelisation at the full world size, on one CPU process with fake tensors.

A fake process group answers for all other ranks and fake tensors have shapes but no memory, so 97 billion parameters
on 512 ranks take a minute and less than a gigabyte. One forward and one backward of rank 0 run with every collective
issued and logged; live bytes are tracked by category. What it does not see: values, compiled graphs (blocks run in
eager mode), NCCL and CUDA's allocator.

It owns the process group, so it needs a process of its own: call it from a fresh one, or

    python -m ecdit_train.plan.dry_run --world 512 [--json] experiment=ec_dit_m_64e
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor

from ecdit_train.config.schema import OptimConfig, RunConfig
from ecdit_train.errors import ConfigError, EcditError, Problem
from ecdit_train.model.dit import DiT
from ecdit_train.model.embed import Text
from ecdit_train.parallel.apply import parallelize
from ecdit_train.parallel.mesh import make_mesh

from . import layout as layout_
from .collective_log import Collective, CollectiveLog
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What rank 0 did in one microbatch; bytes."""

    world: int
    collectives: tuple[Collective, ...]
    parameters: int
    """Sharded fp32 parameters."""
    gradients: int
    """Sharded gradients after backward."""
    optimizer: int
    """State after one optimizer step."""
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
    """Run one microbatch of `cfg` on rank 0 of `world` fake ranks. Blocks run in eager mode whatever
    `parallel.compile` says.

    Raises:
        ConfigError: the layout does not fit `world`, or `world` is 1 (nothing is parallel then).
        EcditError: the process already has a process group.
    """
    if world < 2:
        raise ConfigError(Problem(field="world", value=world, rule="a dry run needs at least two ranks", nearest=2))
    if dist.is_initialized():
        raise EcditError("a dry run owns the process group: start it in a process of its own")
    layout_.resolve(cfg, world=world)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    started = time.monotonic()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        return _run(cfg, world=world, started=started)
    finally:
        dist.destroy_process_group()


def _run(cfg: RunConfig, *, world: int, started: float) -> DryRun:
    parallel = dataclasses.replace(cfg.parallel, compile=False)
    mesh = make_mesh(parallel, device_type="cpu", world=world)
    with torch.device("meta"):
        model = DiT(cfg.model, cfg.moe, channels=cfg.encoders.image.channels, text_features=cfg.encoders.text.width)
    parallelize(model, mesh=mesh, parallel=parallel, precision=cfg.train.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        batch = _batch(cfg)
        tracker, log = FSDPMemTracker(model), CollectiveLog()
        tracker.track_inputs((batch["latents_BCHW"], batch["text"].features_BLX))
        with tracker, log:
            prediction = model(**batch, pool=cfg.pool_tokens)
            after_forward = _snapshot(tracker, "current")
            loss = prediction.patches_BKP.float().square().mean()
            if prediction.balance_loss is not None:
                loss = loss + prediction.balance_loss
            loss.backward()
        if log.unknown:
            raise AssertionError(f"collectives without a rule in collective_log: {dict(log.unknown)}")
        peak, after_backward = _snapshot(tracker, "peak"), _snapshot(tracker, "current")
        optimizer = _optimizer_bytes(cfg.optim, model)
    return DryRun(
        world=world,
        collectives=log.collectives(),
        parameters=after_forward["Sharded Param"],
        gradients=after_backward["Sharded Grad"],
        optimizer=optimizer,
        gathered=after_forward["Unsharded Param"],
        activations_kept=after_forward["Activation"],
        peak=peak.pop("Total"),
        peak_parts=peak,
        seconds=time.monotonic() - started,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _batch(cfg: RunConfig) -> dict[str, Any]:
    """Arguments of the network for one microbatch; shapes and types as the training step makes them."""
    images, text, side = cfg.train.microbatch, cfg.encoders.text, cfg.latent_side
    whole = cfg.tokens_per_image == cfg.patches_per_image
    return {
        "latents_BCHW": torch.empty(images, cfg.encoders.image.channels, side, side),
        "t_B": torch.empty(images),
        "text": Text(
            features_BLX=torch.empty(images, text.max_tokens, text.width),
            mask_BL=torch.empty(images, text.max_tokens, dtype=torch.bool),
            drop_B=torch.empty(images, dtype=torch.bool),
        ),
        "keep_BK": None if whole else torch.empty(images, cfg.tokens_per_image, dtype=torch.int64),
    }


def _optimizer_bytes(optim: OptimConfig, model: nn.Module) -> int:
    """One step of the real optimizer; bytes of the state that this rank holds."""
    params = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if optim.kind == "rmsprop":
        optimizer = torch.optim.RMSprop(params, lr=optim.lr, alpha=optim.decay, momentum=optim.momentum, foreach=True)
    else:
        optimizer = torch.optim.AdamW(params, lr=optim.lr, foreach=True)
    optimizer.step()
    tensors = [
        v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.dim()
    ]
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


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A dry run held against its plan."""

    document: dict[str, Any]
    """Plain values: {"dry_run": ..., "differences": ...}."""
    text: str
    within: bool
    """Whether every formula is within `compare.TOLERANCE` of the dry run."""


def check(plan: Plan) -> Checked:
    """Dry-run what was planned and compare; errors as in `dry_run`."""
    from . import compare

    ran = dry_run(plan.cfg, world=plan.cost.layout.world)
    rows = compare.compare(plan, ran)
    return Checked(
        document=compare.to_json(ran, rows), text=compare.render(ran, rows), within=all(row.within for row in rows)
    )


def main(argv: list[str] | None = None) -> int:
    """Entry of `python -m ecdit_train.plan.dry_run`: `ecdit plan --dry-run` without the plan; returns the exit code."""
    from ecdit_train.config.compose import compose

    from .plan import estimate

    parser = argparse.ArgumentParser(prog="python -m ecdit_train.plan.dry_run", description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, help="ranks (default: cluster.nodes * cluster.gpus_per_node)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", help="key=value words, as for every ecdit command")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        checked = check(estimate(compose(args.overrides), world=args.world))
    except EcditError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(checked.document) if args.json else checked.text)
    return 0 if checked.within else 1


if __name__ == "__main__":
    sys.exit(main())
