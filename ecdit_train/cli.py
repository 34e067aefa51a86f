"""The `ecdit` command: one verb per function, thin. Rooms are imported inside verbs, so that `ecdit --help` is immediate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_train import errors
from ecdit_train.errors import ConfigError, EcditError, PeerLostError, PeerRefusedError, Problem

OVERRIDES = "Hydra words: experiment=NAME, GROUP=CHOICE, section.key=value (see `ecdit config keys`)"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; a user's mistake becomes one line on stderr and its own exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # argparse stops collecting words at the first option
    if args.nproc > 1 and "RANK" not in os.environ:
        from launch.local import run_ranks

        sys.exit(run_ranks(sys.argv[1:] if argv is None else argv, nproc=args.nproc))  # a rank passes over --nproc
    try:
        code = args.verb(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough, as in `ecdit plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = errors.EXIT_OK
    except Exception as e:
        if not isinstance(getattr(e, "exit_code", None), int):
            raise
        _tell(e)
        code = e.exit_code  # type: ignore[attr-defined]
    if code and code != PeerLostError.exit_code:  # the rank that was lost knows better
        from launch.submit import leave_exit_code

        leave_exit_code(code)  # torchrun answers every failure with 1; the job script reads this instead
    sys.exit(code)


def _tell(error: Exception) -> None:
    """One line per problem on stderr, once: what all ranks found is told by the first one of each machine."""
    shared = getattr(error, "everywhere", False) and os.environ.get("LOCAL_RANK", "0") != "0"
    if shared or isinstance(error, PeerRefusedError):
        return
    rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
    for line in str(error).splitlines():
        print(f"ecdit: {type(error).__name__}{rank}: {line}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ecdit",
        description="Train, sample, measure and plan EC-DiT: diffusion transformers whose experts choose their tokens.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="run the verb as N ranks on this machine (train, resume, "
        "sample, evaluate); on a cluster use `ecdit launch` or torchrun",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=argparse.ArgumentParser)

    def verb(name: str, function: Any, text: str, *, parent: Any = verbs) -> argparse.ArgumentParser:
        p = parent.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        p.set_defaults(verb=function)
        return p

    p = verb(
        "train",
        train,
        "train a run from a configuration; goes on where it stopped if the run folder has checkpoints\n\n"
        "  ecdit train experiment=shapes_tiny run=runs/demo train.steps=200\n"
        "  ecdit --nproc 8 train experiment=ec_dit_xl_8e parallel.ep=8 data.shards=/data/shards run=/runs/xl8e",
    )
    p.add_argument("overrides", nargs="*", metavar="WORD", help=OVERRIDES)
    _stop_after(p)

    p = verb(
        "resume",
        resume,
        "go on with a run from its newest sound checkpoint, on any number of ranks\n\n"
        "  ecdit resume runs/demo train.steps=2000",
    )
    p.add_argument("run", help="run folder")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="WORD",
        help="changes to layout, schedule or logging; what defines the network, "
        "the data order or the random draws is refused",
    )
    _stop_after(p)

    p = verb(
        "sample",
        sample,
        "draw prompts with a trained run: an image grid with captions\n\n"
        "  ecdit sample run=runs/demo prompts='a photo of a red circle|a photo of a blue square'\n"
        "  ecdit sample run=runs/demo prompts=@prompts.txt guidance=3 steps=50 scope=group out=grid.png",
    )
    p.add_argument(
        "words",
        nargs="+",
        metavar="KEY=VALUE",
        help="run=FOLDER, prompts='A|B|...' or prompts=@FILE; optional: out=FILE, "
        "repeat=N, weights=ema|raw, step=N, and any key of the sample section (sampler, steps, guidance, scope, "
        "group_size, seed)",
    )

    p = verb(
        "evaluate",
        evaluate,
        "grade a run on the coloured-shapes suite with its exact grader\n\n  ecdit evaluate run=runs/demo tasks=colors",
    )
    p.add_argument(
        "words",
        nargs="+",
        metavar="KEY=VALUE",
        help="run=FOLDER; optional: tasks=A,B (default all six), repeat=N, "
        "split=all|train|heldout, weights=ema|raw, step=N, and any key of the sample section",
    )

    p = verb(
        "report",
        report,
        "write RUN/report.html: loss, samples over time, routing heat maps, in one self-contained page",
    )
    p.add_argument("run", help="run folder")

    p = verb(
        "plan",
        plan,
        "what a run would cost: parameters, memory, traffic, step time, the layout that fits; on a CPU, in seconds\n\n"
        "  ecdit plan experiment=ec_dit_m_64e cluster=h100_ib400 cluster.nodes=8",
    )
    p.add_argument("overrides", nargs="*", metavar="WORD", help=OVERRIDES)
    p.add_argument("--json", action="store_true", help="print one JSON object (docs/reference/plan-json.md)")
    p.add_argument("--world", type=int, help="ranks (default: cluster.nodes * cluster.gpus_per_node)")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="build and spread the real model on fake ranks, run forward and backward, list every collective",
    )

    p = verb(
        "launch",
        launch,
        "render the sbatch script of a run, freeze its configuration and submit it\n\n"
        "  ecdit launch experiment=ec_dit_m_64e cluster=h100_ib400 cluster.nodes=8 run=/scratch/m64e --render-only",
    )
    p.add_argument("overrides", nargs="*", metavar="WORD", help=OVERRIDES)
    p.add_argument("--render-only", action="store_true", help="print the script; write and submit nothing")

    data = parser_group(verbs, "data", "make, index and verify shards")
    p = verb(
        "shapes",
        data_shapes,
        "draw the procedural coloured-shapes set into WebDataset shards\n\n"
        "  ecdit data shapes out=data/shapes count=4000 resolution=32",
        parent=data,
    )
    p.add_argument(
        "words",
        nargs="+",
        metavar="KEY=VALUE",
        help="out=FOLDER; optional: count=N, resolution=PIXELS, seed=N, "
        "per_shard=N, mix=task:weight,..., scale=LOW,HIGH, format=png|jpg",
    )
    p = verb(
        "index", data_index, "index plain WebDataset tars: an .idx beside each tar and a manifest.json", parent=data
    )
    p.add_argument("folder")
    p = verb(
        "verify", data_verify, "read every byte of a data set and check it against its index and manifest", parent=data
    )
    p.add_argument("folder")

    config = parser_group(verbs, "config", "show, list and compare configurations")
    p = verb("show", config_show, "print the resolved configuration of some words", parent=config)
    p.add_argument("overrides", nargs="*", metavar="WORD", help=OVERRIDES)
    p = verb("keys", config_keys, "list every key with its type and how it may change on resume", parent=config)
    p = verb("diff", config_diff, "what two run folders' configurations differ in", parent=config)
    p.add_argument("old")
    p.add_argument("new")

    checkpoint = parser_group(verbs, "checkpoint", "list and verify checkpoints")
    p = verb("list", checkpoint_list, "committed checkpoints of a run", parent=checkpoint)
    p.add_argument("run")
    p = verb(
        "verify",
        checkpoint_verify,
        "check every byte of a run's checkpoints against their manifests",
        parent=checkpoint,
    )
    p.add_argument("run")
    return parser


class _Parser(argparse.ArgumentParser):
    """Looks exit codes up when help is asked for: they lie in rooms that a command need not import."""

    def format_help(self) -> str:
        self.epilog = _exit_codes()
        return super().format_help()


def parser_group(verbs: Any, name: str, text: str) -> Any:
    p = verbs.add_parser(name, help=text, description=text)
    return p.add_subparsers(required=True, metavar="VERB")


def _stop_after(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="save and exit with code 75 after this step, as if Slurm had asked (a drill; the demo uses it)",
    )


# --- training -------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose, validate

    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = compose.compose(args.overrides)
    validate.validate(config, world=world)
    folder = Path(config.run)
    if (folder / compose.RESOLVED).exists():
        compat.check_resume(compose.load(folder), config, allow=compat.classes())
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
    words = _words(
        args.words, own={**_DRAWING, "prompts": _prompts, "out": Path}, required=("run", "prompts"), sampling=True
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
    words = _words(
        args.words,
        own={**_DRAWING, "tasks": _tasks, "split": _one_of("all", "train", "heldout")},
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

    changes = [f"sample.{k}={v}" for k, v in words.items() if k in _SAMPLING]
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
    document = to_json(result)
    if not args.json:
        print(render(result), end="")
    if args.dry_run:
        from ecdit_train.plan import compare, dry_run

        ran = dry_run.dry_run(config, world=result.cost.layout.world)
        rows = compare.compare(result, ran)
        document |= compare.to_json(ran, rows)
        if not args.json:
            print("\n" + compare.render(ran, rows), end="")
    if args.json:
        print(json.dumps(document, indent=2))
    return errors.EXIT_OK


def launch(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose, validate
    from launch import render, submit

    config = compose.compose(args.overrides)
    validate.validate(config, world=config.cluster.nodes * config.cluster.gpus_per_node)
    if args.render_only:
        print(render.render(config, run_folder=Path(config.run)), end="")
        return errors.EXIT_OK
    script = submit.prepare(config)
    print(f"job {submit.submit(script)} submitted: {script}")
    return errors.EXIT_OK


# --- data, configuration, checkpoints -------------------------------------------------------------------------------


def data_shapes(args: argparse.Namespace) -> int:
    from data_pipeline.prepare import make_shapes
    from data_pipeline.shapes_prompts import TASKS

    words = _words(
        args.words,
        required=("out",),
        own={
            "out": Path,
            "count": _whole(1),
            "resolution": _whole(1),
            "seed": _whole(0),
            "per_shard": _whole(1),
            "mix": _mix,
            "scale": _range,
            "format": _one_of("png", "jpg"),
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
    from ecdit_train.config import compat

    for key, kind in compat.classes().items():
        print(f"{key:<44}{kind}")
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


_SAMPLING = frozenset({"sampler", "steps", "guidance", "scope", "group_size", "seed"})
"""Keys of the configuration's sample section that drawing verbs take; their values are read with the configuration's own rules."""


def _words(
    words: Sequence[str], *, own: Mapping[str, Callable[[str], Any]], required: Sequence[str], sampling: bool = False
) -> dict[str, Any]:
    """KEY=VALUE words of a verb, each value through its reader; every mistake at once."""
    import difflib

    readers = dict(own) | (dict.fromkeys(_SAMPLING, str) if sampling else {})
    problems: list[Problem] = []
    out: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in readers:
            near = difflib.get_close_matches(key, sorted(readers), n=1, cutoff=0.0)
            problems.append(Problem(field=key, value=value, rule="is not a key of this verb", nearest=f"{near[0]}=..."))
            continue
        try:
            out[key] = readers[key](value)
        except (ValueError, OSError) as e:
            problems.append(Problem(field=key, value=value, rule=str(e)))
            out[key] = None
    problems += [
        Problem(field=key, value=None, rule="is required", nearest=f"{key}=...") for key in required if key not in out
    ]
    if problems:
        raise ConfigError(problems)
    return out


def _whole(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise ValueError(f"must be a whole number, {low} or more")
        return int(text)

    return read


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def _tasks(text: str) -> list[str]:
    from data_pipeline.shapes_prompts import TASKS

    if not set(text.split(",")) <= set(TASKS):
        raise ValueError(f"must be some of {', '.join(TASKS)}, joined by commas")
    return text.split(",")


def _prompts(text: str) -> list[str]:
    """`A|B|...`, or one a line in @FILE."""
    lines = (
        Path(text[1:]).read_text(encoding="utf-8").splitlines() if text.startswith("@") else text.strip("[]").split("|")
    )
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("needs at least one prompt, as in 'a photo of a red circle'")
    return prompts


def _mix(text: str) -> dict[str, float]:
    try:
        return {task: float(weight) for task, weight in (word.split(":") for word in text.split(","))}
    except ValueError:
        raise ValueError("must be task:weight,task:weight,...") from None


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in text.split(","))
    except ValueError:
        raise ValueError("must be two numbers, LOW,HIGH") from None
    return low, high


def _exit_codes() -> str:
    import data_pipeline.errors
    import launch.submit  # noqa: F401 - defines its own kind

    lines = [
        "exit codes:",
        f"  {errors.EXIT_OK:<4} done",
        "  2    the command line itself cannot be read",
        f"  {errors.EXIT_REQUEUE:<4} stopped on request, everything saved: run again",
    ]
    kinds: list[Any] = [
        *EcditError.__subclasses__(),
        data_pipeline.errors.DataError,
        *data_pipeline.errors.DataError.__subclasses__(),
    ]
    for kind in sorted((kind for kind in kinds if "exit_code" in vars(kind)), key=lambda kind: kind.exit_code):
        lines.append(f"  {kind.exit_code:<4} {kind.__name__}: {(kind.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


_DRAWING: dict[str, Callable[[str], Any]] = {
    "run": str,
    "repeat": _whole(1),
    "weights": _one_of("ema", "raw"),
    "step": _whole(0),
    "text_encoder": str,
    "image_codec": str,
}
"""What every drawing verb takes."""


if __name__ == "__main__":
    main()
