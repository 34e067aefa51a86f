"""The composition root: a frozen configuration becomes objects. The only file that sees every room."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline.errors import WrongView
from ecdit_train import atomic, header, lineage
from ecdit_train.batches.encoded import EncodedBatches, Encoders, make_encoders
from ecdit_train.batches.loader import make_loader
from ecdit_train.checkpoint import folder, manifest, restore
from ecdit_train.checkpoint.background import Saver
from ecdit_train.checkpoint.manager import CheckpointManager
from ecdit_train.checkpoint.retention import Retention
from ecdit_train.config.convert import to_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.stored import freeze
from ecdit_train.diffusion.flow import Flow
from ecdit_train.errors import CheckpointError, ConfigError, Problem, StorageError
from ecdit_train.evaluate.pictures import PromptGrid, SamplePipeline
from ecdit_train.model.init import persistent_buffers
from ecdit_train.observe.console import Progress
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.observe.redact import redact_text
from ecdit_train.observe.sinks import SinkContext, Sinks, open_sinks
from ecdit_train.parallel.context import ParallelContext, mesh_of, spread
from ecdit_train.parallel.digest import Digests
from ecdit_train.parallel.mesh import Mesh
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.plan.cost import cost
from ecdit_train.plan.flops import per_step
from ecdit_train.plan.layout import resolve
from ecdit_train.plan.parameters import count
from ecdit_train.run_folder import CHECKPOINTS, WANDB_ID
from ecdit_train.supervise import lives
from ecdit_train.supervise.beats import Heart
from ecdit_train.supervise.ownership import Ownership, own
from ecdit_train.train.guard import Guard
from ecdit_train.train.saving import Saves
from ecdit_train.train.state import TrainState, placed
from ecdit_train.train.trainer import Trainer
from ecdit_train.train.validation import Validation

MAX_PATCH = 1 << 20
"""Characters of a difference that are kept."""


def build_trainer(
    config: RunConfig,
    runtime: Runtime,
    *,
    stop_after: int | None = None,
    heart: Heart | None = None,
    wait: float = 0.0,
) -> Trainer:
    """Everything a run needs, with the newest sound checkpoint loaded if the folder has one, and the run folder ours.

    A folder that is there is owned before anything in it is read, for at most `wait` seconds of waiting for another owner. Until
    all of it stands, nothing is written into a new run folder: what cannot start leaves no trace.
    """
    run, expires = Path(config.run), config.watch.lease
    # An error on any rank is met by all in `own`, or later by the others in their next exchange.
    exists = runtime.broadcast_object(run.is_dir())
    if heart is not None and wait > 0:
        heart.enter("idle")
    owned = own(run, peers=runtime, expires=expires, wait=wait) if exists else None
    if heart is not None and wait > 0:
        heart.enter("start")
    try:
        trainer = _assemble(config, runtime, owned or Ownership(), stop_after=stop_after)
    except BaseException:
        if owned is not None:
            owned.release()
        raise
    if heart is not None:
        trainer.heart = heart
    try:
        if owned is None:
            trainer.ownership = own(run, peers=runtime, expires=expires, fresh=True)
        _open(trainer)
    except BaseException:
        trainer.close()
        raise
    return trainer


def _assemble(config: RunConfig, runtime: Runtime, owned: Ownership, *, stop_after: int | None) -> Trainer:
    """The trainer, with what it goes on from; writes nothing."""
    run = Path(config.run)
    progress = Progress(config.train.steps, stream=sys.stdout if runtime.rank == 0 else None)
    progress.message("  opening data and encoders")
    # What a user can get wrong comes first, the model after.
    mesh = mesh_of(config, runtime)
    encoders = runtime.together(lambda: make_encoders(config, runtime.device))
    batches = runtime.together(lambda: make_batches(config, mesh, runtime=runtime, encoders=encoders, life=owned.life))
    runtime.together(partial(same_data, runtime.all_gather_json(batches.state_dict())))
    parallel = spread(config, runtime, mesh=mesh)
    progress.message(_size(config, runtime))
    pipeline = make_pipeline(config, parallel, encoders=encoders)
    state = TrainState.fresh(parallel.model, config.optim, sharding=parallel.sharding)
    flow = Flow(
        config=config.diffusion,
        seed=config.train.seed,
        patch=config.model.patch,
        num_kept=config.tokens_per_image,
    )
    trainer = Trainer(
        config=config,
        parallel=parallel,
        state=state,
        flow=flow,
        batches=batches,
        saves=make_saves(
            config,
            runtime,
            say=progress.message,
            still_ours=lambda: trainer.ownership.still_ours(),
            enter=lambda: trainer.heart.enter("save"),
        ),
        window=make_window(config, runtime),
        progress=progress,
        sinks=Sinks(),
        drawer=None,
        stop_after=stop_after,
        ownership=owned,
        flops=tuple((first, model_flops(stage)) for first, stage in config.stages()),
        guard=Guard(config.health, runtime=runtime),
        validation=make_validation(config, parallel, encoders=encoders, state=state, flow=flow),
        digests=Digests(runtime),
    )
    if pipeline is not None and config.observe.prompts:
        trainer.drawer = PromptGrid(pipeline=pipeline, run=run, still_ours=lambda: trainer.ownership.still_ours())
    # The newest sound checkpoint of this folder, else another run's weights (`train.init_from`), else first weights.
    trainer.resumed = resumed = trainer.resume()
    if resumed is None and config.train.init_from is not None:
        load_weights(config.train.init_from, parallel, kind="ema", step=None, start=True)
        if trainer.state.ema is not None:
            trainer.state.ema.restart()
    progress.message("  reading the first batch")
    runtime.together(batches.prepare)
    return trainer


def _size(config: RunConfig, runtime: Runtime) -> str:
    counted = count(config)
    device = "cpu" if runtime.device.type == "cpu" else torch.cuda.get_device_name(runtime.device)
    active = counted.activated - counted.encoders
    return header.parameters(total=counted.network, active=active, device=device, threads=torch.get_num_threads())


def _open(trainer: Trainer) -> None:
    """The run folder as this life needs it."""
    config, runtime, owned, resumed = trainer.config, trainer.parallel.runtime, trainer.ownership, trainer.resumed
    run = Path(config.run)
    runtime.together(lambda: _freeze(trainer) if runtime.rank == 0 else None)
    made = lineage.here(attempt=owned.life) if runtime.rank == 0 else None
    trainer.lineage = runtime.broadcast_object(made)
    if resumed is not None:
        for rejected in resumed.rejected:
            trainer.progress.message(f"checkpoint of step {rejected.step} passed over: {rejected.reason}")
        trainer.progress.message(f"resumed from step {resumed.step}")
        for line in lineage.changes(resumed.lineage, trainer.lineage):
            trainer.progress.message(f"made by another {line}")
    if runtime.rank == 0:
        _keep_lineage(trainer, trainer.lineage)
    about = SinkContext(
        folder=run,
        name=config.experiment,
        config=to_dict(config),
        resume_step=trainer.state.step,
        life=owned.life,
        lineage=trainer.lineage,
    )
    trainer.sinks = open_sinks(
        about,
        config.observe.sinks,
        rank=runtime.rank,
        limits=config.observe.alerts,
        life=owned.life,
        still_ours=owned.recently_ours,
        say=trainer.progress.message,
    )
    trainer.lineage = runtime.broadcast_object(dict(trainer.lineage) | {"wandb_id": _wandb_id(run)})
    owned.begin(ranks=runtime.world, from_step=trainer.state.step, steps=config.train.steps)
    facts = {"run": str(run.absolute()), "life": owned.life, "world": runtime.world, "grace": config.watch.grace}
    trainer.heart.about(facts)


def _freeze(trainer: Trainer) -> None:
    trainer.ownership.still_ours()
    try:
        freeze(trainer.config, trainer.config.run)
    except OSError as error:
        raise StorageError(f"the configuration cannot be written into {trainer.config.run}: {error}") from error


def _keep_lineage(trainer: Trainer, made: Mapping[str, Any]) -> None:
    """The difference between the code that runs and its commit beside the life's record; W&B's id where only a
    checkpoint knows it (a run folder may be made anew around copied checkpoints). A disk that refuses is no
    reason not to train."""
    run, resumed, git = Path(trainer.config.run), trainer.resumed, made["git"]
    known = resumed.lineage.get("wandb_id") if resumed is not None else None
    with contextlib.suppress(OSError):
        if git is not None and git["changed"]:
            text = redact_text(lineage.diff().decode(errors="replace"))[:MAX_PATCH]
            atomic.write(lives.path_of(run, number=trainer.ownership.life).with_suffix(".patch"), text.encode())
        if isinstance(known, str) and known.isalnum() and not (run / WANDB_ID).exists():
            atomic.write(run / WANDB_ID, f"{known}\n".encode())


def _wandb_id(run: Path) -> str | None:
    try:
        return (run / WANDB_ID).read_text().strip() or None
    except OSError:
        return None


def make_batches(
    config: RunConfig, mesh: Mesh, *, runtime: Runtime, encoders: Encoders, life: int = 0, held_out: bool = False
) -> EncodedBatches:
    """The training's images, or those held out of it."""
    return EncodedBatches(
        make_loader(
            config,
            mesh,
            run=Path(config.run),
            life=life,
            held_out=held_out,
            agree=lambda own: min(runtime.all_gather_json(own)),
        ),
        encoders=encoders,
        config=config.encoders,
        latent_side=config.latent_side,
        device=runtime.device,
    )


def same_data(states: Sequence[Mapping[str, Any]]) -> None:
    """Of each rank: a set that is indexed anew while a job starts is another one for some of them. Raises WrongView."""
    strange = [rank for rank, state in enumerate(states) if state != states[0]]
    if strange:
        names = sorted(key for key in states[0] if states[strange[0]].get(key) != states[0][key])
        raise WrongView(
            f"rank {strange[0]} (of {len(strange)}) reads other data than rank 0: {', '.join(names) or 'more keys'} differ; "
            "was the set indexed while the run started? Start it again"
        )


def make_validation(
    config: RunConfig, parallel: ParallelContext, *, encoders: Encoders, state: TrainState, flow: Flow
) -> Validation | None:
    """None when no images are held out."""
    if config.validation.images == 0:
        return None
    return Validation.of(
        flow,
        parallel=parallel,
        state=state,
        batches=parallel.runtime.together(
            lambda: make_batches(config, parallel.mesh, runtime=parallel.runtime, encoders=encoders, held_out=True)
        ),
        num_batches=config.validation.images // config.train.global_batch,
        microbatch=config.train.microbatch,
        group_tokens=config.group_tokens,
        layers=config.sparse_layers,
    )


def make_saves(
    config: RunConfig,
    runtime: Runtime,
    *,
    say: Callable[[str], None],
    still_ours: Callable[[], None],
    enter: Callable[[], None],
) -> Saves:
    """The run's checkpoints, written as its configuration says, while the run folder is ours."""
    c = config.checkpoint
    beside = c.save == "background" and hasattr(os, "memfd_create")  # Linux
    manager = CheckpointManager(
        Path(config.run) / CHECKPOINTS,
        comm=runtime,
        retention=Retention(keep=c.keep, every=c.keep_every, best=c.keep_best),
        saver=Saver(patience=config.watch.save / 3) if beside else None,
        still_ours=still_ours,
    )
    return Saves(manager, c, runtime=runtime, say=say, enter=enter)


def build_pipeline(
    config: RunConfig, runtime: Runtime, *, kind: Literal["ema", "raw"], step: int | None
) -> tuple[SamplePipeline, int]:
    """A sample pipeline with a run's trained weights, and the step they come from."""
    encoders = runtime.together(lambda: make_encoders(config, runtime.device))
    parallel = spread(config, runtime)
    step = load_weights(config.run, parallel, kind=kind, step=step)
    for router in parallel.model.routers:
        router.at_step(step)
    pipeline = make_pipeline(config, parallel, encoders=encoders)
    if pipeline is None:
        raise ConfigError(
            Problem(
                field="encoders",
                value="stored in the shards",
                rule="drawing needs a text encoder and a codec that can decode; name the ones that made the shards",
                nearest="encoders/text=t5 encoders.text.path=FOLDER encoders.image.path=FOLDER",
            )
        )
    return pipeline, step


def make_pipeline(config: RunConfig, parallel: ParallelContext, *, encoders: Encoders) -> SamplePipeline | None:
    """None when the shards carry what the encoders would make and no encoder is there to draw with."""
    if encoders.text is None or encoders.image is None:
        return None
    return SamplePipeline(parallel=parallel, text=encoders.text, codec=encoders.image, config=config)


def model_flops(config: RunConfig) -> float:
    """Of one optimizer step over all ranks."""
    return per_step(config, checkpointing=config.parallel.activation_checkpointing).model


def planned_mfu(config: RunConfig, *, world: int) -> float | None:
    """Utilisation as `ecdit plan` foresees it; None for a layout that it refuses, which is no reason not to train."""
    try:
        parameters = count(config)
        return cost(config, parameters, resolve(config, world=world)).step_time.mfu
    except ConfigError:
        return None


def make_window(config: RunConfig, runtime: Runtime) -> MetricWindow:
    """Utilisation needs a known peak, which only a GPU has."""
    on_gpu = runtime.device.type == "cuda"
    return MetricWindow(
        device=runtime.device,
        images_per_step=config.train.global_batch,
        tokens_per_step=config.train.global_batch * config.tokens_per_image,
        flops_per_step=model_flops(config),
        peak_flops=config.cluster.peak_flops * runtime.world if on_gpu else None,
        planned_mfu=planned_mfu(config, world=runtime.world) if on_gpu else None,
    )


def words_seen(run: str, *, step: int) -> list[str] | None:
    """Words of the captions up to a committed step; None where the checkpoint does not say, or the encoder needs no
    training to know a word."""
    try:
        described = manifest.read(folder.path_of(Path(run) / CHECKPOINTS, step=step))
    except (CheckpointError, OSError):
        return None
    return described.objects.get("words") or None


def load_weights(
    run: str, parallel: ParallelContext, *, kind: Literal["ema", "raw"], step: int | None, start: bool = False
) -> int:
    """Put a run's committed weights into the model, averaged (if it keeps an average) or raw, with the buffers: the
    newest, or `step`. Returns its step. `start`: as another run's first weights, whose routers may keep other buffers."""
    root = Path(run) / CHECKPOINTS
    path = folder.path_of(root, step=step) if step is not None else folder.newest(root)
    if path is None or not path.exists():
        raise CheckpointError(
            f"{run} has no committed checkpoint{'' if step is None else f' of step {step}'}; it has "
            f"{[c.step for c in folder.find(root)] or 'none: train it first'}"
        )
    stored = manifest.read(path).tensors
    part = "ema" if kind == "ema" and any(name.startswith("ema/") for name in stored) else "model"
    targets = {f"{part}/{name}": p.detach() for name, p in parallel.model.named_parameters()}
    buffers = {f"buffer/{name}": buffer for name, buffer in persistent_buffers(parallel.model)}
    skip = ["optim.", "model/" if part == "ema" else "ema/"]
    if start:  # routers may differ: what the other run does not have keeps its first values
        buffers = {n: b for n, b in buffers.items() if n in stored and stored[n].info.shape == tuple(b.shape)}
        skip.append("buffer/")
    return restore.load(path, targets=placed(targets | buffers, parallel), comm=parallel.runtime, skip=skip).step
