"""Workers of test_dist_sampling.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dist_runs import Layout, configure
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from ecdit_train.build import build_pipeline


def drawn_once(here: Any, run: Path, shards: Path, layouts: dict[str, Layout], prompts: list[str]) -> dict[str, Any]:
    """By layout: whether pictures with the prompt's work done once are those with it done in every step, bit for bit;
    how often FSDP gathers weights with 2 and with 4 steps of the sampler; whether all is given back."""
    out = {}
    gather, gathers = _fsdp_param_group.foreach_all_gather, [0]

    def counted(*args: Any, **named: Any) -> Any:
        gathers[0] += 1
        return gather(*args, **named)

    _fsdp_param_group.foreach_all_gather = counted
    for name, layout in layouts.items():
        config = configure(here, run, shards, *layout.words)
        pipeline, _ = build_pipeline(config, here, kind="raw", step=None)
        model = pipeline.parallel.model
        groups = [
            g for m in model.modules() if isinstance(m, FSDPModule) for g in m._get_fsdp_state()._fsdp_param_groups
        ]
        policy = [group.post_forward_mesh_info for group in groups]
        how, codec, latents = replace(config.sample, scope="image", guidance=2.0), pipeline.codec, []

        class Keeping:
            def decode(self, x: Any, codec: Any = codec, latents: Any = latents) -> Any:
                latents.append(x.clone())
                return codec.decode(x)

        pipeline = replace(pipeline, codec=Keeping())
        counts = []
        for steps in (2, 4):
            gathers[0] = 0
            pipeline.draw(prompts, how=replace(how, steps=steps), step=0)
            counts.append(gathers[0])
        given_back = all(g.is_sharded for g in groups) and policy == [g.post_forward_mesh_info for g in groups]
        model.prompt = lambda text: text  # type: ignore[method-assign]
        pipeline.draw(prompts, how=replace(how, steps=4), step=0)
        out[name] = {
            "equal": torch.equal(latents[1], latents[2]),
            "gathers": counts,
            "given_back": given_back,
            "fsdp": len(groups),
        }
    _fsdp_param_group.foreach_all_gather = gather
    return out


def draw(here: Any, run: Path, shards: Path, layouts: dict[str, Layout], asked: list[tuple[str, list[str]]]
         ) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:  # fmt: skip
    """Pictures and routing maps of each (scope, prompts), by layout."""
    out = {}
    for name, layout in layouts.items():
        config = configure(here, run, shards, *layout.words)
        pipeline, _ = build_pipeline(config, here, kind="raw", step=None)
        drawn = []
        for scope, prompts in asked:
            pictures = pipeline.draw(
                prompts, how=replace(config.sample, scope=scope, group_size=32, guidance=2.0), step=0
            )
            assert pictures.prompts == tuple(prompts)
            drawn.append((pictures.images, pictures.maps.counts))
        out[name] = drawn
    return out
