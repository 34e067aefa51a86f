"""What ranks do in test_dist_nucleus.py, and its layers: shared experts, Nucleus's and DiffMoE's routers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dist_cases
from dist_cases import KEPT, MOE, Case, Errors
from dist_poisons import POISONS
from dist_runs import Layout, Life, copy_checkpoints, live

from ecdit_train.model.dit import DiT
from ecdit_train.model.experts.swiglu import SwiGLU
from ecdit_train.model.routers.diffmoe import DiffMoE
from ecdit_train.model.routers.nucleus import Nucleus
from ecdit_train.parallel.expert_parallel import sparse_layers
from ecdit_train.parallel.mesh import Mesh

SHARED = replace(MOE, shared_experts=1)
SHARED_SWIGLU = replace(MOE, shared_experts=2, experts=SwiGLU(), expert_ratio=0.75)
NUCLEUS = replace(
    MOE,
    router=Nucleus(capacity_factor=2.0, sees="timestep", scores="softmax", route_scale=2.5),
    experts=SwiGLU(),
    scope="image",
    shared_experts=1,
    expert_ratio=0.75,
)
NUCLEUS_SIGMOID = replace(NUCLEUS, router=replace(NUCLEUS.router, scores="sigmoid", sees="hidden"))
DIFFMOE = replace(
    MOE,
    router=DiffMoE(capacity_factor=2.0, predictor_weight=1.0, momentum=0.9, sees="modulated"),
    scope="batch",
)
PER_IMAGE = KEPT
"""Tokens of a group of scope `image`."""


def poison_shared_region(model: DiT, mesh: Mesh) -> None:
    """Tokens enter the shared experts without the sum of their gradient over tp."""
    for moe in sparse_layers(model).values():
        moe.shared._forward_pre_hooks.clear()
        moe.shared._forward_pre_hooks_with_kwargs.clear()


def poison_timesteps(model: DiT, mesh: Mesh) -> None:
    """The router sees the timestep of the next image."""
    for moe in sparse_layers(model).values():
        moe.router.register_forward_pre_hook(
            lambda _, args: (replace(args[0], timestep_BD=args[0].timestep_BD.roll(1, 0)),)
        )


OWN_POISONS = {"shared_region": poison_shared_region, "timesteps": poison_timesteps}


def check_cases(runtime: Any, cases: list[Case]) -> list[tuple[str, Errors]]:
    """As in dist_cases, with the poisons of this file."""
    POISONS.update(OWN_POISONS)
    return dist_cases.check_cases(runtime, cases)


def stopped(here: Any, folder: Path, shards: Path, runs: dict[str, tuple[str, ...]]) -> dict[str, Life]:
    """The first four steps of each run, saved."""
    return {name: live(here, folder / name, shards, words, stop_after=4) for name, words in runs.items()}


def gone_on(
    here: Any, folder: Path, shards: Path, runs: dict[str, tuple[str, ...]], layouts: dict[str, Layout]
) -> dict[tuple[str, str], Life]:
    """Each run's newest checkpoint under each layout, to the end; by run and layout."""
    out = {}
    for name, words in runs.items():
        for where, layout in layouts.items():
            copy = folder / f"{name}-on-{where}-of-{here.world}"
            copy_checkpoints(here, folder / name, copy)
            out[name, where] = live(here, copy, shards, (*words, *layout.words))
    return out
