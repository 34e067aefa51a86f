"""`ecdit allocation`: the paper's Figure 6 as numbers that can be wrong, of a run's own weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ecdit_train import arguments, errors
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.run_folder import allocation_path

DRAWN_PROMPTS = 64
PAPER = "(the paper's Figure 6 shows more on objects)"


def allocation(args: argparse.Namespace) -> int:
    from ecdit_train.drawing import drawing_request, opened_pipeline, tell_wandb, written

    asked, config = drawing_request(arguments.Allocation, args)
    if config.moe.router is None:
        rule = f"{asked.run} is a dense network: every patch gets the same"
        raise ConfigError(Problem(field="moe", value="dense", rule=rule))
    if asked.drawn and asked.pictures is not None:
        rule = "objects of drawn pictures are known for coloured shapes alone"
        raise ConfigError(Problem(field="drawn", value=True, rule=rule, nearest="false"))
    with opened_pipeline(asked, config) as (pipeline, step, writes):
        kinds, source, count = _kinds(asked, pipeline, step)
    if not writes:
        return errors.EXIT_OK

    from ecdit_train.evaluate.allocation import document, table, write
    from ecdit_train.observe import allocation_plot

    c = pipeline.config
    router = c.moe.router.at(step)
    group = (
        f"groups of {c.sample.group_size} tokens" if c.sample.scope == "group" else f"one group per {c.sample.scope}"
    )
    print(
        f"experts per patch: step {step}, {asked.weights} weights, {c.moe.num_experts} experts, {router.experts_per_token():g} per "
        f"patch planned, {group}; mean over {count} seed{'s' * (count > 1)} +- standard deviation"
    )
    for name, kind in kinds.items():
        left = f", {kind.left_out} left out as they show no object beside a background" if kind.left_out else ""
        print(f"\n{name} pictures: {kind.pictures} {source[name]}{left}\n{table(kind, layers=c.sparse_layers)}")
    print()
    for name, kind in kinds.items():
        print(f"{name} pictures: {kind.says()} {PAPER}")
    about = {
        "step": step,
        "weights": asked.weights,
        "layers": list(c.sparse_layers),
        "experts": c.moe.num_experts,
        "capacity_factor": router.experts_per_token(),
        "scope": c.sample.scope,
        "group_size": c.sample.group_size,
        "seeds": count,
        "sources": source,
    }
    made = document(kinds, **about)
    path = Path(asked.out) if asked.out else allocation_path(Path(asked.run), step=step)
    with written(path, instead="; name another place: out=FILE"):
        write(made, path)
        picture = allocation_plot.write(made, path.with_suffix(".png"))
    print(f"{path}, {picture.name} beside it")
    if not asked.out:  # what lies elsewhere `ecdit dash sync` would not find
        tell_wandb(config, path)
    return errors.EXIT_OK


def _kinds(asked: Any, pipeline: Any, step: int) -> tuple[dict[str, Any], dict[str, str], int]:
    """(kind -> allocation, kind -> what the pictures are, seeds)."""
    from data_pipeline.shapes.grader import foreground
    from ecdit_train.evaluate import suites
    from ecdit_train.evaluate.allocation import on_drawn_pictures, on_true_pictures
    from ecdit_train.evaluate.masked import masked_pictures

    c = pipeline.config
    seeds = range(1, asked.seeds + 1)
    if asked.pictures is not None:
        own = masked_pictures(
            Path(asked.pictures),
            resolution=c.data.resolution,
            side=c.latent_side // c.model.patch,
            multiple=suites.images_together(pipeline),
        )
        true = on_true_pictures(pipeline, lambda seed: own, seeds=seeds)  # the noise differs
        return {"true": true}, {"true": f"of {asked.pictures} ({len(own.images)}, each with other noise)"}, len(seeds)
    seen = suites.shapes_seen(c)
    kind = "coloured shapes as in its training set" if seen.trained else "coloured shapes, all tasks"
    true = on_true_pictures(
        pipeline,
        lambda seed: suites.shapes_for(pipeline, spec=seen.spec, seed=seen.seed + seed, least=asked.images),
        seeds=seeds,
    )
    kinds, source = {"true": true}, {"true": f"{kind}, none of them trained on"}
    if asked.drawn is not False:
        prompts = [seen.prompts[i * len(seen.prompts) // asked.images] for i in range(asked.images)]
        kinds["drawn"] = on_drawn_pictures(pipeline, prompts, seeds=seeds, step=step, objects=foreground)
        source["drawn"] = "drawn from prompts of that set"
    return kinds, source, len(seeds)
