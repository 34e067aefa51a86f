"""The composition root: a frozen configuration becomes objects. The only file that sees every room.

Each component receives its own section and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.assemble import default_fields
from data_pipeline.contract import Batch
from data_pipeline.errors import BadArray, DataError
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
from data_pipeline.shapes import ShapesSpec, shape_sample
from data_pipeline.shapes_grader import grade
from data_pipeline.shapes_prompts import TASKS, Split, all_prompts
from ecdit_train.checkpoint import folder, manifest, restore
from ecdit_train.checkpoint.comm import Comm, GroupComm, SingleProcess
from ecdit_train.checkpoint.layout import Placed
from ecdit_train.checkpoint.manager import CheckpointManager
from ecdit_train.config.stored import freeze
from ecdit_train.config.convert import to_dict
from ecdit_train.config.schema import RunConfig, SampleConfig
from ecdit_train.diffusion.encoders import ImageCodec, TextEncoder, make_image_codec, make_text_encoder
from ecdit_train.diffusion.flow import Flow
from ecdit_train.errors import CheckpointError, ConfigError, Problem
from ecdit_train.evaluate.pictures import Painter, Pictures
from ecdit_train.evaluate.shapes import Grader
from ecdit_train.model.dit import DiT
from ecdit_train.observe import figures
from ecdit_train.observe.console import Progress
from ecdit_train.observe.folder import routing_path
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.observe.sinks import open_sinks
from ecdit_train.parallel import grads, weights
from ecdit_train.parallel.apply import parallelize
from ecdit_train.parallel.data_parallel import gather_over_dp, reduce_over_dp
from ecdit_train.parallel.fsdp import accumulate, reshard
from ecdit_train.parallel.mesh import Mesh, make_mesh
from ecdit_train.parallel.placement import ParamPlacement
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.plan.flops import per_step
from ecdit_train.train.loop import Loop
from ecdit_train.train.state import TrainState, parameter_of
from ecdit_train.train.step import Microbatch


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process, its place among the ranks, and the model spread over them."""

    runtime: Runtime
    mesh: Mesh
    model: DiT
    placements: Mapping[str, ParamPlacement]

    # --- what a training step asks of the way the model is spread (train.step.Spread) -------------------------------

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        return accumulate(self.model, last=last)

    def clip(self, *, max_norm: float) -> Tensor:
        return grads.clip(self.model, self.placements, self.mesh, max_norm=max_norm)

    def reduce(self, vector: Tensor, *, op: Literal["mean", "max", "sum"]) -> Tensor:
        return reduce_over_dp(vector, self.mesh, op=op)

    # --- what a checkpoint asks -------------------------------------------------------------------------------------

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Placed]:
        """Every tensor of the state with its place in the global tensor: the place of the parameter it belongs to."""
        return {name: Placed(tensor=t, placement=self.placements[parameter_of(name)]) for name, t in tensors.items()}

    def comm(self) -> Comm:
        return SingleProcess() if self.runtime.control is None else GroupComm(self.runtime.control)


def spread_model(config: RunConfig, here: Runtime, *, mesh: Mesh) -> Ranks:
    """The network built on the meta device, spread, then filled with its first weights box by box."""
    with torch.device("meta"):
        model = DiT(
            config.model, config.moe, channels=config.encoders.image.channels, text_features=config.encoders.text.width
        )
    placements = parallelize(model, mesh=mesh, parallel=config.parallel, precision=config.train.precision)
    model.to_empty(device=here.device)
    weights.fill(model, placements, seed=config.train.seed)
    return Ranks(runtime=here, mesh=mesh, model=model, placements=placements)


class EncodedBatches:
    """The loader's numpy batches as device tensors, through the frozen encoders where the shards hold raw data."""

    def __init__(
        self,
        loader: StreamingLoader,
        *,
        text: TextEncoder | None,
        codec: ImageCodec | None,
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self._loader, self._text, self._codec, self._config, self._device = loader, text, codec, config, device
        self._first: tuple[Batch, Microbatch] | None = None

    def prepare(self) -> None:
        """Make the first batch now: bad data is refused before a run folder is made for it. The loader's state is asked for only
        after `fetch`, so it never counts a batch that nobody trained on."""
        raw = next(self._loader)
        batch = self._encode(raw)
        self._first = raw, batch
        image, text = self._config.encoders.image, self._config.encoders.text
        side = self._config.latent_side
        for what, found, wanted in (
            (
                "latents of shape (channels, side, side)",
                tuple(batch.latents_BCHW.shape[1:]),
                (image.channels, side, side),
            ),
            ("text embeddings of width", batch.features_BLX.shape[2], text.width),
        ):
            if found != wanted:
                raise BadArray(f"{self._config.data.shards}: {what} {found}; the configuration says {wanted}")

    def fetch(self) -> Batch:
        return next(self._loader) if self._first is None else self._first[0]

    def encode(self, raw: Batch) -> Microbatch:
        first, self._first = self._first, None
        return self._encode(raw) if first is None else first[1]

    def substituted(self) -> int:
        return sum(self._loader.stats().bad.values())

    def _encode(self, batch: Batch) -> Microbatch:
        if batch.latents is not None:
            image = self._config.encoders.image
            latents = (torch.from_numpy(batch.latents).to(self._device).float() - image.shift) * image.scale
        else:
            assert self._codec is not None
            assert batch.images is not None
            latents = self._codec.encode(torch.from_numpy(batch.images).to(self._device))
        if batch.text is not None:
            assert batch.text_mask is not None
            features, mask = torch.from_numpy(batch.text), torch.from_numpy(batch.text_mask)
        else:
            assert self._text is not None
            assert batch.captions is not None
            features, mask = self._text.encode(batch.captions)
        return Microbatch(
            position_B=torch.from_numpy(batch.position).to(self._device),
            latents_BCHW=latents,
            features_BLX=features.to(self._device),
            mask_BL=mask.to(self._device),
        )

    def close(self) -> None:
        self._loader.close()


def make_encoders(config: RunConfig, device: torch.device) -> tuple[TextEncoder | None, ImageCodec | None]:
    dtype = torch.bfloat16 if config.train.precision == "bf16" and device.type == "cuda" else torch.float32
    return (
        make_text_encoder(config.encoders.text, device=device, dtype=dtype),
        make_image_codec(config.encoders.image, device=device, dtype=dtype),
    )


def make_loader(config: RunConfig, mesh: Mesh, *, run: Path) -> StreamingLoader:
    view = open_view(Path(config.data.shards))
    stored_latents, stored_text = config.encoders.image.kind == "shards", config.encoders.text.kind == "shards"
    have = default_fields(view, text_len=config.encoders.text.max_tokens if stored_text else 0)
    fields = replace(
        have,
        image=None if stored_latents else have.image,
        latents=have.latents if stored_latents else None,
        caption=None if stored_text else have.caption,
        text=have.text if stored_text else None,
    )
    for section, found in (
        ("encoders.image", fields.latents if stored_latents else fields.image),
        ("encoders.text", fields.text if stored_text else fields.caption),
    ):
        if found is None:
            raise DataError(
                f"{config.data.shards}: {section}.kind = {getattr(config.encoders, section[9:]).kind} needs a member "
                f"that the shards do not have; they hold {', '.join(view.fields)}"
            )
    return StreamingLoader(
        view,
        global_batch=config.train.global_batch,
        rank=mesh.dp_rank,
        world=mesh.dp_size,
        seed=config.train.seed,
        fields=fields,
        resolution=config.data.resolution,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        on_bad=config.data.on_bad,
        max_bad=config.data.max_bad,
        # Tensor-parallel ranks read the same samples; one of them writes down what was bad.
        quarantine=run / f"quarantine-{mesh.dp_rank:04d}.jsonl" if mesh.tp_rank == 0 else None,
    )


def make_painter(
    config: RunConfig, ranks: Ranks, *, encoders: tuple[TextEncoder | None, ImageCodec | None]
) -> Painter | None:
    """None when the shards carry what the encoders would make and no encoder is there to draw with."""
    text, codec = encoders
    if text is None or codec is None:
        return None
    return Painter(
        model=ranks.model,
        text=text,
        codec=codec,
        config=config,
        device=ranks.runtime.device,
        dp_rank=ranks.mesh.dp_rank,
        dp_size=ranks.mesh.dp_size,
        gather=lambda x: gather_over_dp(x, ranks.mesh),
    )


def make_window(config: RunConfig, here: Runtime) -> MetricWindow:
    """Utilisation needs a known peak, which only a GPU has."""
    return MetricWindow(
        device=here.device,
        images_per_step=config.train.global_batch,
        tokens_per_step=config.train.global_batch * config.tokens_per_image,
        flops_per_step=per_step(config, checkpointing=config.parallel.activation_checkpointing).model,
        peak_flops=config.cluster.peak_flops * here.world if here.device.type == "cuda" else None,
    )


def build_training(config: RunConfig, here: Runtime, *, stop_after: int | None) -> Loop:
    """Everything a run needs, with the newest sound checkpoint loaded if the folder has one."""
    run = Path(config.run)
    # What a user can get wrong comes first, the model after: nothing is half-started.
    mesh = make_mesh(config.parallel, device_type=here.device.type, world=here.world)
    encoders, loader = here.together(lambda: (make_encoders(config, here.device), make_loader(config, mesh, run=run)))
    batches = EncodedBatches(loader, text=encoders[0], codec=encoders[1], config=config, device=here.device)
    ranks = spread_model(config, here, mesh=mesh)
    state = TrainState.fresh(ranks.model, config.optim)

    # Resume order: the newest sound checkpoint of this folder, else another run's weights (`train.init_from`), else first weights.
    checkpoints = CheckpointManager(run / "checkpoints", comm=ranks.comm(), keep=config.checkpoint.keep)
    resumed = checkpoints.resume(ranks.placed(state.tensors()))
    window = make_window(config, here)
    if resumed is None and config.train.init_from is not None:
        load_weights(config.train.init_from, ranks, kind="ema", step=None)
        if state.ema is not None:
            state.ema.restart()
    if resumed is not None:
        if resumed.step > config.train.steps:
            raise ConfigError(
                Problem(
                    field="train.steps",
                    value=config.train.steps,
                    rule=f"{config.run} is already at step {resumed.step}",
                    nearest=resumed.step,
                )
            )
        state.restore_step(resumed.step)
        loader.load_state_dict(resumed.objects["loader"])
        window.load_state_dict(resumed.objects.get("window", {}), first=mesh.dp_rank == 0)
    here.together(batches.prepare)

    # Nothing above writes into a new run folder: what cannot start leaves no trace.
    if here.rank == 0:
        freeze(config, run)
    progress = Progress(config.train.steps, stream=sys.stdout if here.rank == 0 else None)
    if resumed is not None:
        for rejected in resumed.rejected:
            progress.message(f"checkpoint of step {rejected.step} passed over: {rejected.reason}")
        progress.message(f"resumed from step {resumed.step}")
    sinks = open_sinks(
        run,
        rank=here.rank,
        wandb_mode=config.observe.wandb,
        wandb_project=config.observe.wandb_project,
        config=to_dict(config),
        name=config.experiment,
        resume_step=state.step,
    )

    def save(step: int) -> None:
        if resumed is None or step != resumed.step:
            checkpoints.save(
                step,
                tensors=ranks.placed(state.tensors()),
                objects={
                    # Metrics of two tp ranks may differ in a last bit; a checkpoint holds one truth.
                    "loader": loader.state_dict(),
                    "window": here.broadcast_object(window.state_dict(ranks.reduce)),
                    "config": to_dict(config),
                },
            )

    painter = make_painter(config, ranks, encoders=encoders)

    def show(step: int) -> None:
        if painter is None or not config.observe.prompts:
            return
        with state.ema.swapped_in() if state.ema is not None else nullcontext():
            pictures = painter.draw(config.observe.prompts, how=config.sample, step=step)
            reshard(ranks.model)
        if here.rank == 0:
            grid = write_pictures(pictures, run=run, how=config.sample, step=step)
            sinks.image(grid, key="samples/grid", step=step, caption=f"step {step}")

    return Loop(
        config=config,
        state=state,
        spread=ranks,
        sinks=sinks,
        progress=progress,
        save=save,
        show=show,
        any_rank=here.any_rank,
        stop_after=stop_after,
        batches=batches,
        window=window,
        flow=Flow(
            config=config.diffusion,
            seed=config.train.seed,
            num_patches=config.patches_per_image,
            num_kept=config.tokens_per_image,
        ),
    )


def write_pictures(pictures: Pictures, *, run: Path, how: SampleConfig, step: int) -> Path:
    """`samples/step_N.png` with its `.json`, and `routing/step_N.npz` for a sparse model."""
    if pictures.maps is not None:
        pictures.maps.save(routing_path(run, step=step))
    return figures.write_samples(
        run,
        step=step,
        images=pictures.images,
        prompts=pictures.prompts,
        guidance=how.guidance,
        sampler=how.sampler,
        steps=how.steps,
        seed=how.seed,
        scope=how.scope,
    )


def load_weights(run: str, ranks: Ranks, *, kind: Literal["ema", "raw"], step: int | None) -> int:
    """Put a run's committed weights into the model, averaged (if it keeps an average) or raw: the newest, or `step`. Returns its
    step."""
    root = Path(run) / "checkpoints"
    path = folder.path_of(root, step=step) if step is not None else folder.newest(root)
    if path is None or not path.exists():
        raise CheckpointError(
            f"{run} has no committed checkpoint{'' if step is None else f' of step {step}'}; it has "
            f"{[c.step for c in folder.find(root)] or 'none: train it first'}"
        )
    averaged = any(name.startswith("ema/") for name in manifest.read(path).tensors)
    part = "ema" if kind == "ema" and averaged else "model"
    params = {f"{part}/{name}": p.detach() for name, p in ranks.model.named_parameters()}
    skip = ("optim.", "model/" if part == "ema" else "ema/")
    return restore.load(path, targets=ranks.placed(params), comm=ranks.comm(), skip=skip).step


def build_painter(
    config: RunConfig, here: Runtime, *, kind: Literal["ema", "raw"], step: int | None
) -> tuple[Painter, int]:
    """A painter with a run's trained weights, and the step they come from."""
    encoders = here.together(lambda: make_encoders(config, here.device))
    ranks = spread_model(config, here, mesh=make_mesh(config.parallel, device_type=here.device.type, world=here.world))
    step = load_weights(config.run, ranks, kind=kind, step=step)
    painter = make_painter(config, ranks, encoders=encoders)
    if painter is None:
        raise ConfigError(
            Problem(
                field="encoders",
                value="shards",
                rule="drawing needs a text encoder and a codec that can decode; name the ones that made the shards",
                nearest="text_encoder=FOLDER image_codec=FOLDER",
            )
        )
    return painter, step


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts with what is wanted of them, and who judges."""

    metadata: list[dict[str, Any]]
    others: np.ndarray
    """For each prompt a true picture of some other prompt of its task: uint8 (n, S, S, 3)."""
    grade: Grader


def shapes_suite(config: RunConfig, *, tasks: Sequence[str] | None, repeat: int, split: Split) -> Suite:
    """The coloured-shapes suite: every prompt of the tasks, `repeat` times."""
    metadata = [m for m in all_prompts(split=split, tasks=tasks or TASKS) for _ in range(repeat)]
    if not metadata:
        raise ConfigError(
            Problem(
                field="tasks",
                value=",".join(tasks or TASKS),
                nearest="color_attr",
                rule=f"has no prompt in split {split}; only color_attr is held out",
            )
        )
    specs = {task: ShapesSpec(resolution=config.data.resolution, mix={task: 1.0}) for task in TASKS}
    others = [shape_sample(i, spec=specs[m["tag"]], seed=0).image for i, m in enumerate(metadata)]
    return Suite(metadata=metadata, others=np.stack(others), grade=lambda image, wanted: grade(image, wanted).correct)
