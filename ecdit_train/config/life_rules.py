"""Rules of what keeps a run alive (`life.py`)."""

from __future__ import annotations

import math
from dataclasses import fields

from ecdit_train.config.nearest import nearest_multiple
from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig


def check_life(cfg: RunConfig, check: Checker) -> None:
    if cfg.checkpoint.every_steps is not None:
        check.at_least(1, ["checkpoint.every_steps"])
    check.at_least(1, ["checkpoint.keep", "validation.every_steps"])
    check.at_least(0, ["checkpoint.keep_every", "checkpoint.keep_best", "validation.images"])
    check.positive(["checkpoint.hours_between_failures", "health.spike_deviations"])
    check.positive([f"watch.{field.name}" for field in fields(cfg.watch)])
    check.at_least(1, ["watch.agree_every"])
    check.at_least(0, ["health.max_skips", "health.max_roll_backs", "health.digest_every"])
    check.at_least(16, ["health.spike_window"])
    _check_alerts(check)
    held, whole = cfg.validation.images, cfg.train.global_batch
    if check.sane("validation.images", "train.global_batch"):
        check.require(
            held % whole == 0,
            "validation.images",
            rule=f"must be a multiple of train.global_batch = {whole}",
            nearest=nearest_multiple(held, whole),
        )
    if cfg.checkpoint.keep_best > 0:
        check.require(
            held > 0,
            "checkpoint.keep_best",
            rule="the best are chosen by validation loss, and no images are held out (validation=held_out)",
            nearest=0,
        )
        every, measured = cfg.checkpoint.every_steps, cfg.validation.every_steps
        check.require(
            every is not None and measured > 0 and every % measured == 0,
            "checkpoint.every_steps",
            rule=f"with keep_best every saved step must be measured: a multiple of validation.every_steps = {measured}",
            nearest=measured if every is None else nearest_multiple(every, max(measured, 1)),
        )


ALERTS = {
    "stall_frac": (0.0, 1.0),
    "slow_steps": (1.0, math.inf),
    "dead_experts": (0, math.inf),
    "router_entropy": (0.0, 0.5),
    "bad_samples": (0, math.inf),
    "free_checkpoints": (0.0, math.inf),
    "restarts": (1, math.inf),
}
"""Limits lie above the first and at or below the second: else the alert would never be silent, or never speak."""


def _check_alerts(check: Checker) -> None:
    for name, (above, most) in ALERTS.items():
        key = f"observe.alerts.{name}"
        if (value := check.values[key]) is None:
            continue
        rule = f"must be above {above:g}" + (f" and at most {most:g}" if most < math.inf else "") + "; null: no alert"
        check.require(
            above < value <= most,
            key,
            rule=rule,
            nearest=most if value > most else above + 1 if isinstance(above, int) else "null",
        )
