"""Sections of sparse layers for tests that build networks without a run."""

from __future__ import annotations

from typing import Any

from ecdit_train.config.schema import MoEConfig
from ecdit_train.model.dispatchers.deterministic import Deterministic
from ecdit_train.model.dispatchers.index_add import IndexAdd
from ecdit_train.model.experts.gelu import Gelu
from ecdit_train.model.routers.expert_choice import ExpertChoice
from ecdit_train.model.routers.threshold import Threshold
from ecdit_train.model.routers.token_choice import TokenChoice


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
    """`router`: expert_choice, token_choice, threshold or dense."""
    plain = {"layers": "even", "expert_ratio": None, "shared_experts": 0}
    values: Any = {"scope": "group", "group_size": 32, **plain, **rest}
    if router == "dense":
        return MoEConfig(router=None, experts=None, dispatcher=None, num_experts=1, **values)
    made: Any = {
        "expert_choice": lambda: ExpertChoice(capacity_factor=capacity_factor, sees="modulated"),
        "token_choice": lambda: TokenChoice(
            capacity_factor=capacity_factor, top_k=top_k, balance_weight=balance_weight, sees="modulated"
        ),
        "threshold": lambda: Threshold(capacity_factor=capacity_factor, momentum=0.9, sees="modulated"),
    }[router]()
    dispatcher = {"index_add": IndexAdd, "deterministic": Deterministic}[combine](cap=cap)
    return MoEConfig(router=made, experts=Gelu(), dispatcher=dispatcher, num_experts=num_experts, **values)
