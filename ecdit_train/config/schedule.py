"""A capacity factor that changes while a run goes on, static within a stage: shapes change only between two of them.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from ecdit_train.config.slots import AffinityConfig

if TYPE_CHECKING:
    from ecdit_train.config.rules import Checker
    from ecdit_train.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class ScheduledCapacity(AffinityConfig):
    """Routers whose experts take C = group * f_c / E tokens of a group. Extend it; ask `at(step)` for the f_c of a step."""

    schedule: tuple[tuple[int, float], ...] = ()
    """Later stages, [[step, f_c], ...]: after `step` updates capacity_factor is f_c. Empty: one value for the whole run."""

    def capacity(self, *, group_tokens: int, num_experts: int) -> float:
        return group_tokens * self.capacity_factor / num_experts

    def stages(self) -> tuple[tuple[int, Self], ...]:
        if not self.schedule:
            return ((0, self),)
        later = ((step, replace(self, capacity_factor=factor, schedule=())) for step, factor in self.schedule)
        return ((0, replace(self, schedule=())), *later)

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        E, field, schedule = run.moe.num_experts, f"{key}.schedule", self.schedule
        if self.check_factor(run, check, key=key):
            rule = f"factors must be greater than 0 and at most moe.num_experts = {E}"
            nearest = as_yaml((step, min(factor, float(E))) for step, factor in schedule if factor > 0)
            check.require(all(0 < factor <= E for _, factor in schedule), field, rule=rule, nearest=nearest)
        steps = [step for step, _ in schedule]
        if check.sane("train.steps", field):
            rule = f"steps must ascend, from 1 to below train.steps = {run.train.steps}"
            inside = {step: factor for step, factor in schedule if 0 < step < run.train.steps}
            fine = steps == sorted(inside)
            check.require(fine, field, rule=rule, nearest=as_yaml(sorted(inside.items())))


def as_yaml(schedule: object) -> str:
    """As a command line says it: [[1000,2.0],[2000,1.0]]."""
    pairs: tuple[tuple[int, float], ...] = tuple(schedule)  # type: ignore[arg-type]
    return "[" + ",".join(f"[{step},{factor!r}]" for step, factor in pairs) + "]"
