"""A run folder as a short training run leaves it, made up in a second: for tests, and for looking at the report.

PYTHONPATH=tests python tests/unit/observe/observe_demo_run.py /tmp/observe_demo
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from moe_configs import moe_config
from PIL import Image, ImageDraw

from ecdit_train import run_folder as folder
from ecdit_train.config.slots import RouterSizes
from ecdit_train.model.assignment import Assignment
from ecdit_train.model.router import RouterInput
from ecdit_train.observe.figures import write_samples
from ecdit_train.observe.journal import Journal
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.observe.report import write_report
from ecdit_train.observe.routing import RoutingMaps, count_maps, expert_maps
from ecdit_train.observe.routing_scalars import routing_maxima, routing_record, routing_sums

PROMPTS = (
    "a red circle",
    "a blue square",
    "a green triangle above a yellow circle",
    "two orange squares side by side",
    "a purple triangle",
    "a photo of a small cyan circle to the left of a very large dark green square on white ground",
    "a black circle",
    "a pink square",
)
SIDE = 8


def picture(n: int, *, noise: float) -> np.ndarray:
    """(32, 32, 3) uint8: a shape, drowned in noise early in the run."""
    color = [
        (220, 40, 40),
        (40, 70, 220),
        (30, 150, 60),
        (240, 140, 30),
        (140, 50, 190),
        (20, 170, 190),
        (30, 30, 30),
        (240, 120, 170),
    ][n % 8]
    image = Image.new("RGB", (32, 32), (238, 238, 232))
    draw = ImageDraw.Draw(image)
    box = (6 + n % 3 * 3, 5 + n % 4 * 2, 20 + n % 3 * 3, 19 + n % 4 * 2)
    if n % 3 == 0:
        draw.ellipse(box, fill=color)
    elif n % 3 == 1:
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=color)
    rng = np.random.default_rng(n)
    grain = rng.normal(0, 90, (32, 32, 3))
    return np.clip((1 - noise) * np.asarray(image) + noise * (128 + grain), 0, 255).astype(np.uint8)


def assignments(
    images: np.ndarray,
    *,
    t: float,
    layers: int = 3,
    experts: int = 8,
    token_choice: bool = False,
    capacity_factor: float = 2.0,
) -> list[Assignment]:
    """Routers with fixed weights on patch features of the pictures; pools of one image."""
    patches = torch.from_numpy(images.copy()).float().div(127.5).sub(1).unfold(1, 4, 4).unfold(2, 4, 4)
    x_BSD = patches.reshape(len(images), SIDE * SIDE, -1)
    found = []
    for layer in range(layers):
        rng = torch.Generator().manual_seed(layer)
        made = moe_config("token_choice" if token_choice else "expert_choice", capacity_factor=capacity_factor)
        router = made.router.build(RouterSizes(width=x_BSD.shape[-1], num_experts=experts, patch_values=1))
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=rng) * (0.1 + 0.5 * t))
            noise = torch.randn(x_BSD.shape, generator=rng)
            found.append(router(RouterInput.of(t * x_BSD + (1 - t) * noise)))
    return found


def routing_scalars(
    microbatches: Sequence[Sequence[Assignment]], *, layers: Sequence[int], t: float = 0.5
) -> dict[str, float]:
    """What a step of these microbatches logs of routing; one image in each group."""
    window = MetricWindow(device="cpu", images_per_step=1, tokens_per_step=1)
    for called in microbatches:
        groups = len(called[0].probability_GSE) if called else 1
        window.add_sums(routing_sums(called, layers=layers, t_B=torch.full((groups,), t)))
        for name, value in routing_maxima(called, layers=layers):
            window.add(name, value)
    record = window.flush(reading=lambda sums: routing_record(sums, layers=layers))
    return {name: value for name, value in record.items() if name.startswith("moe/")}


def write_pictures(run: Path, *, step: int, noise: float) -> None:
    """Samples of the fixed prompts."""
    write_samples(
        run,
        step=step,
        images=np.stack([picture(n, noise=noise) for n in range(8)]),
        prompts=PROMPTS,
        guidance=3.0,
        sampler="heun",
        steps=25,
        seed=0,
        scope="image",
    )


def routing_maps(step: int) -> RoutingMaps:
    images = np.stack([picture(n, noise=0.05) for n in range(4)])
    timesteps = [0.1, 0.3, 0.5, 0.7, 0.9]
    called = [assignments(images, t=t) for t in timesteps]
    counts = torch.stack([count_maps(a, batch=4, side=SIDE) for a in called])
    return RoutingMaps(
        counts=counts.to(torch.uint8).numpy(),
        chosen=torch.stack([expert_maps(a, batch=4, side=SIDE) for a in called]).numpy(),
        timesteps=np.array(timesteps, np.float32),
        layers=(2, 4, 6),
        prompts=PROMPTS[:4],
        images=images,
        scope="image",
        group_size=128,
        experts=8,
        capacity_factor=2.0,
        step=step,
    )


def build(run: Path, *, steps: int = 1500, every: int = 10, grids: int = 6) -> Path:
    """Everything but the report."""
    run.mkdir(parents=True, exist_ok=True)  # a life owns it before it writes
    log = Journal(run)
    rng = np.random.default_rng(0)
    images = np.stack([picture(n, noise=0.1) for n in range(8)])
    for step in range(every, steps + 1, every):
        done = step / steps
        record: dict[str, float] = {
            "train/loss": 0.06 + 0.9 * math.exp(-7 * done) + 0.012 * rng.normal(),
            "train/images": step * 64.0,
            "optim/lr": 3e-4 * min(1, done * 15),
            "optim/grad_norm": 0.4 + math.exp(-9 * done) + 0.05 * abs(rng.normal()),
            "optim/grad_norm_max": 0.6 + 1.4 * math.exp(-9 * done) + 0.2 * abs(rng.normal()),
            "optim/clipped_frac": 0.0,
            "perf/images_per_s": 812 + 9 * rng.normal(),
            "perf/tokens_per_s": 25984 + 290 * rng.normal(),
            "perf/step_s": 0.0788,
            "data/stall_frac": 0.012 + 0.004 * abs(rng.normal()),
            "data/substituted": 0.0,
        }
        if step % (every * 5) == 0:
            record |= routing_scalars([assignments(images, t=0.2 + 0.7 * done)], layers=(2, 4, 6))
        log.log(step, record)
    log.close()
    for n in range(1, grids + 1):
        step = steps * n // grids
        write_pictures(run, step=step, noise=max(0.04, 1 - n / grids))
        if n % 2 == 0:
            routing_maps(step).save(folder.routing_path(run, step=step))
    (run / folder.EVALUATION).mkdir(exist_ok=True)
    (run / folder.EVALUATION / "shapes.json").write_text(
        json.dumps(
            {
                "single": {"accuracy": 0.81, "images": 200},
                "colours": {"accuracy": 0.64, "images": 200},
                "two objects": {"accuracy": 0.27, "images": 200},
            }
        )
    )
    (run / folder.RESOLVED).write_text(
        "run: runs/demo\nexperiment: demo_shapes\nmodel: {name: demo, layers: 6, width: 128, heads: 2, patch: 4}\n"
        "moe: {router: expert_choice, experts: 8, capacity_factor: 2.0, scope: group, group_size: 128}\n"
        f"train: {{seed: 0, steps: {steps}, global_batch: 64, microbatch: 64, precision: fp32}}\n"
        "optim: {kind: adamw, lr: 0.0003, warmup_steps: 100, schedule: cosine, clip_norm: 1.0, ema_decay: 0.999}\n"
        "parallel: {dp_replicate: 1, dp_shard: 1, tp: 1, ep: 1}\n"
    )
    return run


if __name__ == "__main__":
    print(write_report(build(Path(sys.argv[1]))))
