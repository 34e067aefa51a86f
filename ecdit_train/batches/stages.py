"""What fills the slot `data.stages` where a user has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ecdit_train.config.slots import StagesConfig


@dataclass(frozen=True, kw_only=True)
class NoStages(StagesConfig):
    """Samples as they lie in the shards."""

    def build(self) -> list[Any]:
        return []
