"""How the demo's configuration was chosen: train a candidate in memory for some CPU seconds, grade what it draws.

    python -m benchmarks.demo_search seconds=200 [finish=0.2] [any ecdit override ...]

Runs the trainer's own step on one thread, without shards, checkpoints or ranks, and prints a line of JSON at each quarter of
the time: steps, loss, and the share of `colors` prompts ("a photo of a red circle") whose shape and colour the exact grader
finds right (EMA weights, guidance as configured; chance is 1/32 for a generator that ignores the text). `finish` is the
share of the time, at its end, in which no patch is masked. What was tried is in
benchmarks/results/, and the choice with its reasons in docs/decisions/.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_pipeline.shapes.draw import ShapesSpec, shape_sample
from data_pipeline.shapes.grader import grade, single_object
from data_pipeline.shapes.prompts import all_prompts
from ecdit_train.config.compose import compose
from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import Microbatch, split
from ecdit_train.errors import NonFiniteError
from ecdit_train.evaluate.pictures import SamplePipeline
from ecdit_train.observe.figures import sample_grid
from ecdit_train.parallel import runtime
from ecdit_train.parallel.context import spread
from ecdit_train.train.device_guard import DeviceGuard
from ecdit_train.train.optim import learning_rate
from ecdit_train.train.state import TrainState
from ecdit_train.train.step import train_step


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    own = dict(
        w.split("=", 1) for w in words if w.split("=")[0] in ("seconds", "mix", "scale", "count", "grid", "finish")
    )
    overrides = [w for w in words if w.split("=")[0] not in own]
    seconds = float(own.get("seconds", 200))
    mix = {k: float(v) for k, v in (part.split(":") for part in own.get("mix", "single_object:1,colors:4").split(","))}
    scale = tuple(float(s) for s in own.get("scale", "0.55,0.8").split(","))
    c = compose(["experiment=shapes_tiny", *overrides])
    spec = ShapesSpec(resolution=c.data.resolution, mix=mix, scale=(scale[0], scale[1]))
    drawn = [shape_sample(i, spec=spec, seed=0) for i in range(int(own.get("count", 8000)))]
    codec = c.encoders.image.build(device="cpu", dtype=torch.float32)
    text = c.encoders.text.build(device="cpu", dtype=torch.float32)
    latents = codec.encode(torch.from_numpy(np.stack([s.image for s in drawn])))
    features, mask = text.encode([s.caption for s in drawn])

    parallel = spread(c, runtime.alone())
    state, guard = TrainState.fresh(parallel.model, c.optim), DeviceGuard(c.health)
    # The last share of the time on whole pictures, in groups of as many pictures.
    finish = float(own.get("finish", 0))
    group = c.moe.group_size * c.patches_per_image // c.tokens_per_image
    whole = replace(c, diffusion=replace(c.diffusion, mask_ratio=0.0), moe=replace(c.moe, group_size=group))
    stages = [
        (stage, Flow(config=stage.diffusion, seed=c.train.seed, patch=c.model.patch, num_kept=stage.tokens_per_image))
        for stage in (c, whole)
    ]
    pipeline = SamplePipeline(parallel=parallel, text=text, codec=codec, config=c)
    wanted = [m for m in all_prompts(split="all") if m["tag"] == "colors"] * 2
    print(json.dumps({"parameters": sum(p.numel() for p in state.params.values()), "words": words}), flush=True)

    rng = np.random.default_rng(c.train.seed)
    losses: list[float] = []
    drawing = 0.0
    for quarter in range(1, 5):
        while time.process_time() - START - drawing < seconds * quarter / 4:
            rows = torch.from_numpy(rng.integers(0, len(drawn), c.train.global_batch))
            position = torch.arange(c.train.global_batch) + state.step * c.train.global_batch
            batch = Microbatch(
                position_B=position, latents_BCHW=latents[rows], features_BLX=features[rows], mask_BL=mask[rows]
            )
            # The schedule runs on time here: the demo's step count is fixed from what this reaches.
            share = min(1.0, (time.process_time() - START - drawing) / seconds)
            step = (
                state.step
                if state.step < c.optim.warmup_steps
                else int(c.optim.warmup_steps + share * (c.train.steps - c.optim.warmup_steps))
            )
            stage, flow = stages[share > 1 - finish]
            result = train_step(
                list(split(batch, size=c.train.microbatch)),
                parallel=parallel,
                state=state,
                guard=guard,
                lr=learning_rate(step, c.optim, total_steps=c.train.steps),
                max_norm=c.optim.clip_norm,
                flow=flow,
                group_tokens=stage.group_tokens,
            ).numbers()
            if not result.applied:
                raise NonFiniteError(f"{result}: the update was not applied")
            state.step += 1
            losses.append(result.loss)
        t = time.process_time()
        for guidance in (c.sample.guidance,) if quarter < 4 else (1.0, 2.0, 3.0, 5.0):
            how = replace(c.sample, guidance=guidance)
            asked = wanted * (4 if quarter == 4 else 1)
            with state.ema.swapped_in() if state.ema is not None else nullcontext():
                pictures = pipeline.draw([m["prompt"] for m in asked], how=how, step=state.step)
            if "grid" in own and guidance == 2.0:
                sample_grid(pictures.images[:32], pictures.prompts[:32], Path(own["grid"]), columns=8)
            print(
                json.dumps(
                    {
                        "quarter": quarter,
                        "steps": state.step,
                        "loss": round(float(np.mean(losses[-50:])), 4),
                        "guidance": guidance,
                        **shares(pictures.images, asked),
                    }
                ),
                flush=True,
            )
        drawing += time.process_time() - t


def shares(images: np.ndarray, wanted: list[dict]) -> dict[str, float]:
    """Shares of pictures that are right, whose only object has the right shape, and the right colour."""
    right, shape, color = [], [], []
    for image, m in zip(images, wanted, strict=True):
        found = single_object(image)
        shape.append(found is not None and found[0] == m["include"][0]["class"])
        color.append(found is not None and found[1] == m["include"][0]["color"])
        right.append(grade(image, m).correct)
    return {
        "right": round(float(np.mean(right)), 3),
        "shape": round(float(np.mean(shape)), 3),
        "color": round(float(np.mean(color)), 3),
    }


START = time.process_time()
if __name__ == "__main__":
    main(sys.argv[1:])
