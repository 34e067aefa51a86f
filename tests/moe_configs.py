"""Sections of sparse layers for tests that build networks without a run, and random weights for such layers."""

from __future__ import annotations

from typing import Any

import torch

from ecdit_train.config.schema import MoEConfig
from ecdit_train.model.dispatchers.deterministic import Deterministic
from ecdit_train.model.dispatchers.index_add import IndexAdd
from ecdit_train.model.dispatchers.triton import Triton
from ecdit_train.model.experts.gelu import Gelu
from ecdit_train.model.moe import MoE
from ecdit_train.model.routers.expert_choice import ExpertChoice
from ecdit_train.model.routers.expert_race import ExpertRace
from ecdit_train.model.routers.selection import SelectionFamily
from ecdit_train.model.routers.threshold import Threshold
from ecdit_train.model.routers.token_choice import TokenChoice

FAMILY: dict[str, dict[str, Any]] = {
    "ec_image": {"apart": ("batch", "experts"), "gate": "softmax", "pool": "group"},
    "bl": {"apart": ("experts",), "gate": "softmax", "pool": "ranks"},
    "bl_group": {"apart": ("experts",), "gate": "sigmoid", "pool": "group"},
    "be": {"apart": ("tokens",), "gate": "identity", "pool": "ranks"},
    "le": {"apart": ("batch",), "gate": "identity", "pool": "group"},
    "tc": {"apart": ("batch", "tokens"), "gate": "softmax", "pool": "group"},
    "places": {"apart": ("tokens", "experts"), "gate": "sigmoid", "pool": "group"},
    "mixed_race": {"apart": (), "gate": "softmax", "pool": "group", "mixes": True},
}
"""Of the selection family: the shipped presets, and what else takes a path of its own."""


def selection(name: str, *, capacity_factor: float) -> SelectionFamily:
    return SelectionFamily(
        **{"mixes": False, "sees": "modulated", "pool_images": None, **FAMILY[name]}, capacity_factor=capacity_factor
    )


def expert_race(*, capacity_factor: float, **rest: Any) -> ExpertRace:
    """Weights that are large enough to be seen."""
    values: Any = {"momentum": 0.9, "first_threshold": 1.0, "similarity_weight": 0.05, "target_weight": 0.1, **rest}
    return ExpertRace(capacity_factor=capacity_factor, sees="modulated", pool_images=None, **values)


def randomised(moe: MoE, *, std: float = 0.7, seed: int = 7) -> MoE:
    """In fp64, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moe.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return moe


def moe_config(
    router: str = "expert_choice",
    *,
    num_experts: int = 4,
    capacity_factor: float = 1.0,
    top_k: int = 2,
    balance_weight: float = 0.01,
    combine: str = "index_add",
    cap: float | None = None,
    **rest: Any,
) -> MoEConfig:
    """`router`: expert_choice, token_choice, threshold, dense, expert_race or one of FAMILY."""
    plain = {"layers": "even", "expert_ratio": None, "form": "plain", "shared_experts": 0}
    values: Any = {"scope": "group", "group_size": 32, **plain, **rest}
    if router == "dense":
        return MoEConfig(router=None, experts=None, dispatcher=None, num_experts=1, **values)
    made: Any = {
        "expert_choice": lambda: ExpertChoice(capacity_factor=capacity_factor, sees="modulated"),
        "token_choice": lambda: TokenChoice(
            capacity_factor=capacity_factor, top_k=top_k, balance_weight=balance_weight, sees="modulated"
        ),
        "threshold": lambda: Threshold(capacity_factor=capacity_factor, momentum=0.9, sees="modulated"),
        "expert_race": lambda: expert_race(capacity_factor=capacity_factor),
        **{name: lambda name=name: selection(name, capacity_factor=capacity_factor) for name in FAMILY},
    }[router]()
    dispatcher = {"index_add": IndexAdd, "deterministic": Deterministic, "triton": Triton}[combine](cap=cap)
    return MoEConfig(router=made, experts=Gelu(), dispatcher=dispatcher, num_experts=num_experts, **values)
