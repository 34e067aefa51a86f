"""What drawing costs, on a CPU: `python -m benchmarks.sampling` (about two minutes).

EC / dense      the paper's Figure 4: a sampler's evaluation by a network with experts against the dense network of equal size in
                depth and width, guidance in one batch; the paper says +20 to +28 % on 8 H100s
dense, paired   against the dense network whose feed-forward in every second layer is as wide as the experts' work on a token
cached / plain  a whole draw with the work on the prompt done once against its being done in each step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.diffusion.sampler import prompt_positions
from ecdit_train.evaluate.pictures import sample_latents
from ecdit_train.model.dit import DiT
from ecdit_train.model.init import initialise

from .layers import fill_zeros
from .timing import Bar, Work, interleave, report, settle

SIZE = ("experiment=shapes_tiny", "model.width=384", "model.heads=6", "model.kv_heads=6", "model.layers=8",
        "model.text_width=384", "model.text_refiner_layers=2", "data.resolution=64", "encoders.text.width=256",
        "encoders.text.max_tokens=64", "moe.num_experts=16", "moe.group_size=256", "moe.router.capacity_factor=2.0")  # fmt: skip
"""256 patches of a 64 x 64 picture: a medium network, and the tokens of an image that the paper draws."""
PICTURES = 2
STEPS = 4
GOAL = 1.20
"""Time of EC over dense of equal depth and width."""


def network(config: RunConfig, *, wide: bool = False) -> DiT:
    """With first weights; what starts at zero is random, so that routing has something to choose by. `wide`: every second
    feed-forward of a dense network is f_c times as wide."""
    model = DiT(
        config.model, config.moe, channels=config.encoders.image.channels, text_features=config.encoders.text.width
    )
    if wide:
        other = DiT(
            replace(config.model, ffn_ratio=2 * config.model.ffn_ratio),
            config.moe,
            channels=config.encoders.image.channels,
            text_features=config.encoders.text.width,
        )
        for number in range(1, config.model.layers, 2):
            model.blocks[number] = other.blocks[number]
    initialise(model, seed=0)
    fill_zeros(model, std=0.02)
    return model.eval()


def forms() -> dict[str, Work]:
    """One draw of a few pictures with each."""
    sparse, dense = compose([*SIZE]), compose([*SIZE[:-3], "moe=dense"])
    prompts = ["a red circle", "two blue squares"][:PICTURES]
    text = sparse.encoders.text.build(device="cpu", dtype=torch.float32)
    features, position = text.encode(prompts), prompt_positions(prompts)

    def draw(model: DiT, config: RunConfig) -> None:
        sample_latents(
            model,
            features=features,
            position_B=position,
            shape=(config.encoders.image.channels, config.latent_side, config.latent_side),
            config=replace(config.sample, steps=STEPS, guidance=3.0),
            prediction=config.diffusion.prediction,
            group_tokens=config.patches_per_image,
        )

    networks = {
        "ec": (network(sparse), sparse),
        "dense": (network(dense), dense),
        "dense, paired": (network(dense, wide=True), dense),
        "ec, plain": (network(sparse), sparse),
    }
    networks["ec, plain"][0].prompt = lambda text: text  # type: ignore[method-assign, assignment, return-value]
    return {name: lambda pair=pair: draw(*pair) for name, pair in networks.items()}  # type: ignore[misc]


def counted(work: Work) -> float:
    """FLOPs of the products and of attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90.0, help="after which no round begins but the first three")
    asked = parser.parse_args(argv)
    settle()
    works = forms()
    of = interleave({"draw": works}, rounds=asked.rounds, seconds=asked.seconds)["draw"]
    pairs = {
        "ec / dense": ("ec", "dense"),
        "ec / dense, paired": ("ec", "dense, paired"),
        "cached / plain": ("ec", "ec, plain"),
    }
    ratios = {name: {"ratio": of.ratio(*pair), "iqr": of.spread(*pair)} for name, pair in pairs.items()}
    for name, row in ratios.items():
        print(f"{name:<22} {row['ratio']:.3f} (iqr {row['iqr']:.3f})")
    flops = {name: counted(work) for name, work in works.items()}
    more = {
        name: flops["ec"] / flops[other] for name, other in (("dense", "dense"), ("dense, paired", "dense, paired"))
    }
    print(
        f"FLOPs of a draw: EC / dense {more['dense']:.3f}, paired {more['dense, paired']:.3f}; goal for the time: {GOAL:.2f}"
    )
    ratios["flops"] = {f"ec / {name}": value for name, value in more.items()}
    bars = [
        Bar(
            name="EC / dense, over its FLOPs", value=of.ratio("ec", "dense") / more["dense"], limit=1.08, at_least=False
        ),
        Bar(
            name="EC / dense of equal work on a token",
            value=of.ratio("ec", "dense, paired"),
            limit=1.10,
            at_least=False,
        ),
        Bar(name="prompt once / in each step", value=of.ratio("ec", "ec, plain"), limit=1.00, at_least=False),
    ]
    settings = {"size": list(SIZE), "pictures": PICTURES, "steps": STEPS, "rounds": of.rounds}
    return report("sampling", settings=settings, ratios=ratios, bars=bars)


if __name__ == "__main__":
    sys.exit(main())
