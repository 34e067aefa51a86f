"""`ecdit study routing`: one small model under every router, at equal activated FLOPs, with seeds, told as a table and a plot.

Each arm is `moe=NAME` with words that make its layers cost what the dense network's cost: experts half as wide as the
dense feed-forward, two per token. What a router itself costs comes on top and is in the table. Every job trains in a
process of its own into `OUT/ARM-SEED-WORDS`; what is done is not done again, so the same command goes on where it was
stopped. Nothing is left out of the table, and nothing is chosen after looking.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ecdit_train import arguments, atomic, errors, study_report, sweep
from ecdit_train.comparison import final_loss
from ecdit_train.config import compose
from ecdit_train.config.overrides import quoted
from ecdit_train.config.resolve import declarations_only
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.observe.journal import read_records

from .study_report import Measured

COST_OF_DENSE = (
    *("moe.layers=even", "moe.expert_ratio=2.0", "moe.shared_experts=0", "moe/experts=gelu"),
    "moe.router.capacity_factor=2.0",
)
"""Experts half as wide as the dense feed-forward (ratio 4), two per token: they cost what it costs. Routers differ
by their names alone."""

ROUTERS: Mapping[str, tuple[str, ...]] = {
    "dense": (),
    **dict.fromkeys(("expert_choice", "ec_image", "bl", "be", "le", "expert_race"), COST_OF_DENSE),
    **dict.fromkeys(("token_choice", "tc", "threshold", "nucleus", "diffmoe"), COST_OF_DENSE),
}
"""Choice of the group `moe` -> its words. An arm that is not here is `moe=ARM` as it stands."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models and how long the runs are."""

    words: tuple[str, ...]
    experts: int
    """Of every sparse layer; what each takes of an image is whole."""
    pictures: int
    """In the training set."""
    resolution: int
    seeds: tuple[int, ...]
    nproc: int
    """Ranks of each run, if nobody says."""


SIZES: Mapping[str, Size] = {
    "small": Size(
        words=(
            *("experiment=shapes_tiny", "train.steps=200", "train.global_batch=64", "train.microbatch=32"),
            *("optim.warmup_steps=20", "optim.ema_decay=0.98", "observe.log_every=10", "observe.sample_every=0"),
        ),
        experts=9,
        pictures=4000,
        resolution=24,
        seeds=(1, 2),
        nproc=2,
    ),
    "gpu": Size(
        words=("experiment=shapes_small",), experts=8, pictures=200_000, resolution=64, seeds=(1, 2, 3), nproc=1
    ),
}
MIX = {"single_object": 1.0, "colors": 4.0}
SCALE = (0.55, 0.8)
"""Of the pictures, as in the demo: what a model of this size can learn."""
SET_SEED = 0
"""Of the training pictures; those that are only looked at have another."""
GRADED = {"tasks": ("colors",), "repeat": 4}

REPORT, PLOT, RESULTS = "study.md", "study.png", "results.json"


def digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class Job:
    arm: str
    seed: int
    words: tuple[str, ...]
    run: Path
    config: RunConfig


class Study:
    """A study in a folder.

    Raises:
        ConfigError: whatever is wrong with any job; nothing has been made.
    """

    def __init__(
        self,
        out: Path,
        *,
        size: str,
        arms: Sequence[str],
        seeds: Sequence[int],
        words: Sequence[str],
        nproc: int | None,
        config_dir: str | None,
    ) -> None:
        taken = [w for w in words if w.lstrip("+~").partition("=")[0] in ("moe", "train.seed", "run", "experiment")]
        if taken:
            rule = "is what the study itself sets: say arms, seeds, out or size"
            raise ConfigError([Problem(field=w.partition("=")[0], value=w.partition("=")[2], rule=rule) for w in taken])
        self.out, self.size, self.config_dir = out, SIZES[size], config_dir
        self.nproc = nproc or self.size.nproc
        self.arms, self.seeds = dict.fromkeys(arms or ROUTERS), dict.fromkeys(seeds or self.size.seeds)
        self.own_data = not any(w.startswith("data.shards=") for w in words)
        self.jobs = self._jobs(words)
        self.results = self._earlier()
        self.failed: list[str] = []

    def _jobs(self, words: Sequence[str]) -> list[Job]:
        asked = [(arm, seed) for seed in self.seeds for arm in self.arms]
        lines = [
            [*self.size.words, f"moe={arm}", *self._words_of(arm), f"train.seed={seed}", *words] for arm, seed in asked
        ]
        # What is trained otherwise lies elsewhere: a run of other words is another run.
        runs = [
            self.out / f"{arm}-{seed}-{digest([*line, str(self.nproc)])}"
            for (arm, seed), line in zip(asked, lines, strict=True)
        ]
        where = [f"data.shards={quoted(str(self._data(self.size.resolution)))}"] if self.own_data else []
        lines = [[*line, *where, f"run={quoted(str(run))}"] for line, run in zip(lines, runs, strict=True)]
        made = sweep.check_each(words, lines, world=self.nproc, config_dir=self.config_dir)
        sides = {m.config.data.resolution for m in made}
        if self.own_data and sides != {self.size.resolution}:
            rule = f"the study's pictures have {self.size.resolution} pixels: give data.shards=FOLDER for others"
            raise ConfigError(
                Problem(field="data.resolution", value=max(sides), rule=rule, nearest=self.size.resolution)
            )
        return [
            Job(arm=arm, seed=seed, words=tuple(line), run=run, config=m.config)
            for (arm, seed), line, run, m in zip(asked, lines, runs, made, strict=True)
        ]

    def _data(self, resolution: int) -> Path:
        return self.out / f"pictures-{resolution}-{self.size.pictures}"

    def run(self) -> int:
        """0; 75 when it was stopped on request; else the exit code of the first job that failed."""
        self._pictures()
        failed = 0
        for number, job in enumerate(self.jobs, 1):
            name = f"[{number}/{len(self.jobs)}] {job.arm}, seed {job.seed}"
            if job.words in self.results:
                print(f"{name}: done before", flush=True)
                continue
            print(f"{name}: {job.run}", flush=True)
            code = self._train(job)
            if code == errors.EXIT_REQUEUE:
                print(f"stopped; the same command goes on: {self.out}", file=sys.stderr)
                return code
            if code:
                print(f"{name}: ended with exit code {code}", file=sys.stderr, flush=True)
                failed = failed or code
                self.failed.append(f"{job.arm}, seed {job.seed}: exit code {code}")
                continue
            self.results[job.words] = self._measure(job)
            self.write()
        if any(job.words in self.results for job in self.jobs):
            print("\n" + self.write())
        return failed

    def write(self) -> str:
        """Results, table and plot as they are now; the table's text."""
        from ecdit_train.observe import study_plot

        every = [asdict(m) for m in self.results.values()]  # also what this call did not ask for
        atomic.write(self.out / RESULTS, (json.dumps(every, indent=1) + "\n").encode())
        found = [self.results[j.words] for j in self.jobs if j.words in self.results]
        train = self.jobs[0].config.train
        text = study_report.text(found, steps=train.steps, batch=train.global_batch, failed=self.failed)
        atomic.write(self.out / REPORT, text.encode())
        study_plot.write(self.out / PLOT, study_report.panels(found))
        return text

    def _words_of(self, arm: str) -> list[str]:
        words = [*ROUTERS.get(arm, ())]
        return [*words, f"moe.num_experts={self.size.experts}"] if words else words

    # --- one job -------------------------------------------------------------------------------------------------------

    def _earlier(self) -> dict[tuple[str, ...], Measured]:
        """What earlier calls measured, by the words of the run."""
        try:
            found = json.loads((self.out / RESULTS).read_text(encoding="utf-8"))
            told = [Measured(**{**m, "words": tuple(m["words"])}) for m in found]
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError) as error:
            rule = f"{RESULTS} in it is not what a study writes ({error}); give another folder, or delete that file"
            raise ConfigError(Problem(field="out", value=str(self.out), rule=rule)) from error
        return {m.words: m for m in told}

    def _pictures(self) -> None:
        from data_pipeline.shapes.make import make_shapes

        folder = self._data(self.size.resolution)
        if self.own_data and not (folder / "manifest.json").exists():
            make_shapes(
                folder,
                count=self.size.pictures,
                resolution=self.size.resolution,
                seed=SET_SEED,
                mix=MIX,
                scale=SCALE,
                samples_per_shard=500,
                image_format="png",
            )

    def _train(self, job: Job) -> int:
        from launch.local import run_command

        ranks = ["--nproc", str(self.nproc)] if self.nproc > 1 else []
        own = ["--config-dir", self.config_dir] if self.config_dir else []
        ended = run_command([*ranks, "train", *own, *job.words])
        return errors.EXIT_REQUEUE if ended.stopped else ended.code

    def _measure(self, job: Job) -> Measured:
        """On one process, with the averaged weights."""
        import torch

        from data_pipeline.shapes.draw import ShapesSpec
        from ecdit_train import build
        from ecdit_train.evaluate import routing_probe, shapes, suites
        from ecdit_train.parallel import runtime
        from ecdit_train.plan.flops import per_step

        words = [*job.words, "parallel.ep=1", "parallel.tp=1", "parallel.dp_replicate=1", "parallel.dp_shard=-1"]
        words += ["parallel.exchange=flat", "parallel.replicate_experts=false"]
        config = compose.configure(words, config_dir=self.config_dir).config
        here = runtime.start("cuda" if torch.cuda.is_available() else "cpu")
        try:
            pipeline, step = build.build_pipeline(config, here, kind="ema", step=None)
            suite = suites.shapes_suite(resolution=config.data.resolution, split="all", **GRADED)  # type: ignore[arg-type]
            pictures = pipeline.draw([m["prompt"] for m in suite.metadata], how=config.sample, step=step)
            graded = shapes.score(pictures.images, suite.metadata, grade=suite.grade, others=suite.others)
            spec = ShapesSpec(resolution=config.data.resolution, mix=MIX, scale=SCALE)
            known = suites.shapes_for(pipeline, spec=spec)
            probe = routing_probe.probe(pipeline, known)
        finally:
            here.shutdown()
        final, router = final_loss(job.run), config.moe.router
        assert final is not None, f"{job.run} ended well and logged no loss"

        def mean(values: Sequence[float]) -> float | None:
            return statistics.fmean(values) if values else None

        return Measured(
            arm=job.arm,
            seed=job.seed,
            words=job.words,
            flops=per_step(config, checkpointing="none").model,
            train_loss=final.loss,
            unseen_loss=statistics.fmean(probe.loss),
            right=graded.overall,
            drawn=graded.num_images,
            chance=graded.chance,
            experts_drawn=None if pictures.maps is None else pictures.maps.experts_per_token,
            budget=None if router is None else router.experts_per_token(),
            on_object=probe.experts_on_object,
            on_background=probe.experts_on_background,
            max_violation=mean(probe.max_violation),
            combination_usage=mean(probe.combination_usage),
            timestep_sensitivity=mean(probe.timestep_sensitivity),
            step_seconds=_step_seconds(job.run),
        )


def _step_seconds(run: Path) -> float:
    return statistics.median(r["perf/step_s"] for r in read_records(run) if "perf/step_s" in r)


def study_routing(args: argparse.Namespace) -> int:
    """The verb."""
    request = arguments.read(arguments.RoutingStudy, args.words)
    asked = request.build(arguments.RoutingStudy)
    with declarations_only():
        study = Study(
            Path(asked.out),
            size=asked.size,
            arms=asked.arms,
            seeds=asked.seeds,
            words=request.rest,
            nproc=asked.nproc,
            config_dir=args.config_dir,
        )
    return study.run()
