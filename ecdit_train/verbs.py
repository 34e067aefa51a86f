"""What each verb of `ecdit` does. Rooms are imported inside, so that `ecdit --help` and a login node need no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_train import arguments, errors
from ecdit_train.errors import PeerLostError

# --- training -------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose, validate

    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = compose.compose(args.overrides)
    validate.validate(config, world=world)
    folder = Path(config.run)
    if (folder / compose.RESOLVED).exists():
        compat.check_resume(compose.load(folder), config, allow=compose.explicit_keys(args.overrides))
    return _run(config, stop_after=args.stop_after)


def resume(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose, validate

    old = _stored(args.run)
    changed = compose.override(old, args.overrides)
    compat.check_resume(old, changed.config, allow=set(changed.explicit))
    validate.validate(changed.config, world=int(os.environ.get("WORLD_SIZE", "1")))
    return _run(changed.config, stop_after=args.stop_after)


def _run(config: Any, *, stop_after: int | None) -> int:
    """Build, freeze the configuration, train. 0 when finished, 75 when stopped on request."""
    from ecdit_train.train.stop import StopRequest

    with StopRequest() as stop:  # before torch, whose import takes seconds
        from ecdit_train.build import build_training
        from ecdit_train.config.convert import from_dict, to_dict

        with _ranks() as here:
            config = from_dict(
                here.broadcast_object(to_dict(config))
            )  # one truth for all ranks, whatever their files say
            loop = build_training(config, here, stop_after=stop_after)
            try:
                finished = loop.run(stop)
            finally:
                loop.close()
    return errors.EXIT_OK if finished else errors.EXIT_REQUEUE


def _stored(run: str) -> Any:
    """The configuration of a run folder, which may have been moved since, or be named from another working directory."""
    from ecdit_train.config import compose

    return replace(compose.load(run), run=run)


@contextmanager
def _ranks() -> Iterator[Any]:
    """Join the other ranks, on GPUs if this machine has them; leave in any case."""
    import torch

    from ecdit_train.parallel import runtime

    here = None
    try:
        here = runtime.start("cuda" if torch.cuda.is_available() else "cpu")
        yield here
    except RuntimeError as e:
        if not runtime.is_peer_lost(e):
            raise
        raise PeerLostError(f"another rank left in the middle of an exchange: {str(e).splitlines()[0]}") from e
    finally:
        if here is not None:
            here.shutdown()


# --- looking --------------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> int:
    words = arguments.read(
        args.words,
        own={**arguments.DRAWING, "prompts": arguments.prompts, "out": Path},
        required=("run", "prompts"),
        sampling=True,
    )
    prompts = words["prompts"] * words.get("repeat", 1)
    pictures, step, here = _draw(words, prompts)
    if here:
        from ecdit_train.observe import figures

        out = words.get("out", Path(words["run"]) / "pictures" / f"step_{step:08d}.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        figures.sample_grid(pictures.images, pictures.prompts, out)
        print(f"{len(prompts)} pictures from step {step}: {out}")
    return errors.EXIT_OK


def evaluate(args: argparse.Namespace) -> int:
    words = arguments.read(
        args.words,
        own={**arguments.DRAWING, "tasks": arguments.tasks, "split": arguments.one_of("all", "train", "heldout")},
        required=("run",),
        sampling=True,
    )
    config = _stored(words["run"])

    from ecdit_train import build
    from ecdit_train.evaluate import shapes

    suite = build.shapes_suite(
        config, tasks=words.get("tasks"), repeat=words.get("repeat", 1), split=words.get("split", "all")
    )
    pictures, step, here = _draw(words, [m["prompt"] for m in suite.metadata])
    if here:
        result = shapes.score(pictures.images, suite.metadata, grade=suite.grade, others=suite.others)
        shapes.write(result, Path(words["run"]) / "evaluation" / f"shapes_{step:08d}.json", step=step)
        print(f"{'task':<16}{'correct':>9}{'chance':>9}   ({result.num_images} pictures, step {step})")
        for task, share in result.by_task.items():
            print(f"{task:<16}{share:>9.1%}{result.chance_by_task[task]:>9.1%}")
        print(f"{'overall':<16}{result.overall:>9.1%}{result.chance:>9.1%}")
    return errors.EXIT_OK


def _draw(words: dict[str, Any], prompts: list[str]) -> tuple[Any, int, bool]:
    """Pictures, the step of the weights, and whether this rank is the one that writes."""
    from ecdit_train.config import compose, validate

    changes = [f"sample.{k}={v}" for k, v in words.items() if k in arguments.SAMPLING]
    if "text_encoder" in words:
        changes += ["encoders.text.kind=t5", f"encoders.text.path={words['text_encoder']}"]
    if "image_codec" in words:
        changes.append(f"encoders.image.path={words['image_codec']}")
    config = compose.override(_stored(words["run"]), changes).config
    validate.validate(config)
    config = replace(config, parallel=_drawing_layout(config.parallel, world=int(os.environ.get("WORLD_SIZE", "1"))))

    from ecdit_train import build

    with _ranks() as here:
        painter, step = build.build_painter(config, here, kind=words.get("weights", "ema"), step=words.get("step"))
        return painter.draw(prompts, how=config.sample, step=step), step, here.rank == 0


def _drawing_layout(trained: Any, *, world: int) -> Any:
    """The layout of the training where this world allows it: what 512 ranks trained, one can draw."""
    return replace(
        trained,
        tp=trained.tp if world % trained.tp == 0 else 1,
        ep=trained.ep if world % trained.ep == 0 else 1,
        dp_replicate=1,
        dp_shard=-1,
    )


def report(args: argparse.Namespace) -> int:
    from ecdit_train.observe.report import write_report

    print(write_report(Path(args.run)))
    return errors.EXIT_OK


# --- planning and submitting ----------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose
    from ecdit_train.plan import estimate, render, to_json

    config = compose.compose(args.overrides)
    result = estimate(config, world=args.world)
    document, code = to_json(result), errors.EXIT_OK
    if not args.json:
        print(render(result), end="")
    if args.dry_run:
        from ecdit_train.plan import dry_run

        checked = dry_run.check(result)
        document |= checked.document
        code = errors.EXIT_OK if checked.within else 1
        if not args.json:
            print("\n" + checked.text, end="")
    if args.json:
        print(json.dumps(document, indent=2))
    return code


def launch(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose, validate
    from launch import submit

    config = compose.compose(args.overrides)
    validate.validate(config, world=config.cluster.nodes * config.cluster.gpus_per_node)
    if args.render_only:
        print(submit.job_script(config), end="")
        return errors.EXIT_OK
    script = submit.prepare(config, allow=compose.explicit_keys(args.overrides))
    print(f"job {submit.submit(script)} submitted: {script}")
    return errors.EXIT_OK


# --- data, configuration, checkpoints -------------------------------------------------------------------------------


def data_shapes(args: argparse.Namespace) -> int:
    from data_pipeline.prepare import make_shapes
    from data_pipeline.shapes_prompts import TASKS

    words = arguments.read(
        args.words,
        required=("out",),
        own={
            "out": Path,
            "count": arguments.whole(1),
            "resolution": arguments.whole(1),
            "seed": arguments.whole(0),
            "per_shard": arguments.whole(1),
            "mix": arguments.mix,
            "scale": arguments.interval,
            "format": arguments.one_of("png", "jpg"),
        },
    )
    made = make_shapes(
        words["out"],
        count=words.get("count", 4000),
        resolution=words.get("resolution", 32),
        seed=words.get("seed", 0),
        mix=words.get("mix", dict.fromkeys(TASKS, 1.0)),
        scale=words.get("scale", (0.2, 0.35)),
        samples_per_shard=words.get("per_shard", 500),
        image_format=words.get("format", "png"),
    )
    print(f"{made.num_samples} samples in {len(made.shards)} shards: {words['out']}")
    return errors.EXIT_OK


def data_index(args: argparse.Namespace) -> int:
    from data_pipeline.manifest import index_folder

    view = index_folder(Path(args.folder))
    print(f"{view.num_samples} samples in {len(view.shards)} shards: {args.folder}")
    return errors.EXIT_OK


def data_verify(args: argparse.Namespace) -> int:
    from data_pipeline.manifest import verify

    verify(Path(args.folder))
    print(f"{args.folder}: every byte agrees with the index and the manifest")
    return errors.EXIT_OK


def config_show(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose, validate

    config = compose.compose(args.overrides)
    validate.validate(config)
    print(compose.to_yaml(config), end="")
    return errors.EXIT_OK


def config_keys(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, convert

    types = convert.leaf_types()
    for key, kind in compat.classes().items():
        print(f"{key:<44}{kind:<10}{convert.type_name(types[key])}")
    return errors.EXIT_OK


def config_diff(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose

    changes = compat.diff(compose.load(args.old), compose.load(args.new))
    for change in changes:
        print(f"{change.field}: {change.old!r} -> {change.new!r}  ({change.kind})")
    return errors.EXIT_OK


def checkpoint_list(args: argparse.Namespace) -> int:
    from ecdit_train.checkpoint import manifest

    for found in _checkpoints(args.run):
        size = manifest.tensor_bytes(manifest.read(found.path))
        print(f"step {found.step:>10}  {size / 1e9:10.3f} GB  {found.path}")
    return errors.EXIT_OK


def checkpoint_verify(args: argparse.Namespace) -> int:
    from ecdit_train.checkpoint import restore

    for found in _checkpoints(args.run):
        restore.verify(found.path)
        print(f"step {found.step}: sound")
    return errors.EXIT_OK


def _checkpoints(run: str) -> Any:
    """The committed checkpoints; a run folder must be there, and hold some: "all sound" must never mean "none looked at"."""
    from ecdit_train.checkpoint import folder

    _stored(run)
    found = folder.find(Path(run) / "checkpoints")
    if not found:
        raise errors.CheckpointError(f"{run} has no committed checkpoint")
    return found
