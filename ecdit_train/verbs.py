"""What each verb of `ecdit` does. Rooms are imported inside, so that `ecdit --help` and a login node need no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_train import arguments, errors, header, submit_verbs
from ecdit_train.config.resolve import declarations_only
from ecdit_train.drawing import agreed, drawing_request, opened_pipeline, tell_wandb, world, written
from ecdit_train.joining import ending, joined
from ecdit_train.run_folder import RESOLVED, evaluation_path, pictures_path
from ecdit_train.supervise import guard
from ecdit_train.supervise.stop import StopRequest, verdict_in

# --- training -------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose, stored

    with StopRequest(rank=_rank()) as stop:  # before anything slow
        with declarations_only():
            made = compose.configure(args.overrides, world=world(), config_dir=args.config_dir)
            folder = Path(made.config.run)
            changed: Sequence[Any] = ()
            if (folder / RESOLVED).exists():
                old = stored.load(folder, config_dir=args.config_dir)
                changed = compat.check_resume(old, made.config, allow=made.explicit)
        return _run(made.config, stop, args, changed=changed)


def resume(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose

    with StopRequest(rank=_rank()) as stop:
        with declarations_only():
            old = _stored(args.run, args.config_dir)
            made = compose.override(old, args.overrides, world=world())
            changed = compat.check_resume(old, made.config, allow=made.explicit)
        return _run(made.config, stop, args, changed=changed)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _run(config: Any, stop: StopRequest, args: argparse.Namespace, *, changed: Sequence[Any]) -> int:
    """Build, freeze the configuration, train. 0 when finished, 75 when stopped on request. `changed`: keys that differ from the
    last life's, for people."""
    stop.grace = config.watch.grace
    if _rank() == 0:
        goes_on = (Path(config.run) / RESOLVED).exists()
        print(header.opening(config, version=header.version(), world=world(), goes_on=goes_on))
        print("  starting torch" + (", waiting for the other ranks" if world() > 1 else ""), flush=True)
    with joined(config.watch, wait=args.wait) as (runtime, heart):
        stop.verdict = verdict_in(heart.folder, read=guard.read_verdict)
        from ecdit_train.build import build_trainer

        config = agreed(config, runtime)
        trainer = build_trainer(config, runtime, stop_after=args.stop_after, heart=heart, wait=args.wait)
        note, code = trainer.ownership.note, errors.EXIT_REQUEUE
        for change in changed:
            trainer.progress.message(f"changed since the last life: {change}")
        if changed:
            note(changed=[str(change) for change in changed])
        stop.last_word = lambda code, why: note(exit_code=code, why=why, step=trainer.state.step)
        trainer.ownership.listen(lambda: stop.ask("ecdit stop"))
        why = "ended by an error that is told nowhere"
        try:
            code = errors.EXIT_OK if trainer.run(stop) else errors.EXIT_REQUEUE
            why = (
                "finished" if code == errors.EXIT_OK else f"stopped by {stop.name or '--stop-after'}, everything saved"
            )
        except BaseException as error:
            code, why = ending(error, heart)
            raise
        finally:
            note(exit_code=code, why=why, step=trainer.state.step)
            trainer.close()
    return code


def _stored(run: str, config_dir: str | None = None) -> Any:
    """The configuration of a run folder, which may have been moved since, or be named from another working directory."""
    from ecdit_train.config import stored

    return replace(stored.load(run, config_dir=config_dir), run=run)


# --- looking --------------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> int:
    asked, config = drawing_request(arguments.Sample, args)
    prompts = [*asked.prompts] * asked.repeat
    with opened_pipeline(asked, config) as (pipeline, step, writes):
        from ecdit_train import build
        from ecdit_train.evaluate import words

        seen = build.words_seen(asked.run, step=step)
        unknown = words.unknown_words(asked.prompts, text=pipeline.text, seen=seen)
        if writes and unknown:
            print(f"ecdit: {words.told(unknown)}", file=sys.stderr, flush=True)
        pictures = pipeline.draw(prompts, how=pipeline.config.sample, step=step)
    if writes:
        from ecdit_train.observe import figures

        out = Path(asked.out) if asked.out else pictures_path(Path(asked.run), step=step)
        with written(out, instead="; name another place: out=FILE"):
            out.parent.mkdir(parents=True, exist_ok=True)
            figures.sample_grid(pictures.images, pictures.prompts, out)
        print(f"{len(prompts)} pictures from step {step}: {out}")
    return errors.EXIT_OK


def evaluate(args: argparse.Namespace) -> int:
    asked, config = drawing_request(arguments.Evaluate, args)

    from ecdit_train.evaluate import routing_probe, shapes, suites

    suite = suites.shapes_suite(
        resolution=config.data.resolution, tasks=asked.tasks or None, repeat=asked.repeat, split=asked.split
    )
    with opened_pipeline(asked, config) as (pipeline, step, writes):
        pictures = pipeline.draw([m["prompt"] for m in suite.metadata], how=pipeline.config.sample, step=step)
        probe = routing_probe.probe(pipeline, suites.shapes_for(pipeline))
    if writes:
        result = shapes.score(pictures.images, suite.metadata, grade=suite.grade, others=suite.others)
        maps = pictures.maps
        spent = {} if maps is None else {"experts_per_token": maps.experts_per_token, "budget": maps.capacity_factor}
        shares = dict(zip(config.sparse_layers, probe.timestep_sensitivity, strict=True))
        spent |= {f"timestep_share_L{layer}": share for layer, share in shares.items()}
        print(f"{'task':<16}{'correct':>9}{'chance':>9}   ({result.num_images} pictures, step {step})")
        for task, share in result.by_task.items():
            print(f"{task:<16}{share:>9.1%}{result.chance_by_task[task]:>9.1%}")
        print(f"{'overall':<16}{result.overall:>9.1%}{result.chance:>9.1%}")
        if maps is not None:
            per_token = f"{maps.experts_per_token:.2f}, planned {maps.capacity_factor:g}"
            print(f"experts per token while drawing (captioned half): {per_token}")
            by_layer = ", ".join(f"L{layer} {share:.2f}" for layer, share in shares.items())
            print(f"share of the affinities' variance that the timestep alone makes: {by_layer}")
        path = evaluation_path(Path(asked.run), suite="shapes", step=step)
        with written(path):  # last: what was found is told even where it cannot be kept
            shapes.write(result, path, step=step, **spent)
        tell_wandb(config, path)
    return errors.EXIT_OK


# --- planning ---------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose
    from ecdit_train.plan import estimate, render, to_json

    config = compose.configure(args.overrides, config_dir=args.config_dir).config
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


# --- sweeps, and what Hydra prints ----------------------------------------------------------------------------------


def multirun(args: argparse.Namespace) -> int:
    """A composing verb under `-m`."""
    from ecdit_train import sweep

    if args.verb not in (train, submit_verbs.launch) or getattr(args, "render_only", False):

        def once(words: list[str]) -> int:
            return int(args.verb(argparse.Namespace(**{**vars(args), "overrides": words})))

        return sweep.each(args.overrides, once, config_dir=args.config_dir)
    folder = ["--config-dir", args.config_dir] if args.config_dir else []
    stop = ["--stop-after", str(args.stop_after)] if getattr(args, "stop_after", None) else []
    with declarations_only():
        return sweep.Sweep(
            args.overrides,
            launcher="slurm" if args.verb is submit_verbs.launch else "local",
            config_dir=args.config_dir,
            before=["--nproc", str(args.nproc)] if args.nproc > 1 else [],
            options=[*folder, *stop],
            nproc=args.nproc,
            after=getattr(args, "after", ()),
            parsable=getattr(args, "parsable", False),
        ).run()


def show(args: argparse.Namespace) -> int:
    """`--cfg` and `--info` of a composing verb: Hydra's own pages, once the words are right."""
    from ecdit_train.config import compose

    with declarations_only():
        compose.compose(args.overrides, config_dir=args.config_dir)
    app = compose.open_app(args.overrides, config_dir=args.config_dir)
    words = compose.for_hydra(args.overrides, config_dir=args.config_dir)
    if args.cfg:
        app.show(words, cfg=args.cfg, package=args.package, resolve=args.resolve)
    else:
        app.info(words, about=args.info)
    return errors.EXIT_OK


# --- data, configuration -------------------------------------------------------------------------------------------


def slots(args: argparse.Namespace) -> int:
    from ecdit_train.config import installed

    with declarations_only():
        print(installed.text(installed.installed(config_dir=args.config_dir)), end="")
    return errors.EXIT_OK


def config_show(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose, stored

    with declarations_only():
        print(stored.to_yaml(compose.configure(args.overrides, config_dir=args.config_dir).config), end="")
    return errors.EXIT_OK


def config_keys(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, compose, convert

    with declarations_only():
        config = compose.compose(args.overrides, config_dir=args.config_dir)
        types = convert.key_types(config)
        for key, kind in compat.classes(config).items():
            print(f"{key:<44}{kind:<10}{convert.type_name(types[key])}")
    return errors.EXIT_OK


def config_explain(args: argparse.Namespace) -> int:
    from ecdit_train.config import compose, describe

    with declarations_only():
        config = compose.compose(args.overrides, config_dir=args.config_dir)
        print(describe.explain(args.key, config, groups=compose.groups(config_dir=args.config_dir)))
    return errors.EXIT_OK


def config_diff(args: argparse.Namespace) -> int:
    from ecdit_train.config import compat, stored

    with declarations_only():
        old, new = (stored.load(run, config_dir=args.config_dir) for run in (args.old, args.new))
        for change in compat.diff(old, new):
            print(f"{change.field}: {change.old!r} -> {change.new!r}  ({change.kind})")
    return errors.EXIT_OK
