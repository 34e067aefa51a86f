"""Workers of test_dist_sampling.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from dist_runs import Layout, configure

from ecdit_train.build import build_pipeline


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
