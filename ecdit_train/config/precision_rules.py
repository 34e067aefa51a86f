"""Rules of 8-bit products (`train.precision: fp8`): what multiplies them, and sizes that its units take."""

from __future__ import annotations

from ecdit_train.config.nearest import nearest_multiple
from ecdit_train.config.rules import Checker, is_whole
from ecdit_train.config.schema import RunConfig


def check_precision(cfg: RunConfig, check: Checker) -> None:
    """Appends what is wrong with fp8; nothing where the run has another precision."""
    recipe = cfg.train.recipe
    if recipe is None:
        return
    rule = (
        "must be emulated or transformer_engine with fp8_recipe = mxfp8: torch has no product with blocks that a test here "
        "could run"
    )
    scaled_mm = cfg.train.fp8_backend == "scaled_mm"
    check.require(recipe != "mxfp8" or not scaled_mm, "train.fp8_backend", rule=rule, nearest="emulated")
    _experts(cfg, check)
    _sizes(cfg, check, multiple=32 if recipe == "mxfp8" else 16)


def _experts(cfg: RunConfig, check: Checker) -> None:
    experts = cfg.moe.experts
    if cfg.moe.router is None or experts is None:
        return
    rule = f"cannot be fp8: {type(experts).__name__} builds no `model.experts.two_layers.TwoLayers`, whose products it replaces"
    check.require(experts.lean, "train.precision", rule=rule, nearest="bf16")


def _sizes(cfg: RunConfig, check: Checker, *, multiple: int) -> None:
    """Both widths of every matrix, as a tp rank holds it. Widths of streams and heads are multiples of 64 by another rule."""
    if not check.sane("parallel.tp", "model.width", "model.ffn_ratio", "moe.expert_ratio", "moe.shared_experts"):
        return
    width, tp = cfg.model.width, cfg.parallel.tp
    unit = f"{multiple}, which fp8 products need"
    hidden = width * cfg.model.ffn_ratio
    if hidden % tp == 0:  # else that is reported
        rule = f"must leave each rank a multiple of {unit}, of the feed-forward width {hidden}"
        fitting = [d for d in range(1, tp) if hidden % d == 0 and hidden // d % multiple == 0]
        check.require(hidden // tp % multiple == 0, "parallel.tp", rule=rule, nearest=max(fitting, default=None))
    if cfg.moe.router is None or not is_whole(cfg.expert_ratio * width):
        return
    expert = round(cfg.expert_ratio * width)
    nearest = nearest_multiple(expert, multiple) / width
    rule = f"gives experts a width of {expert}; must be a multiple of {unit}"
    if check.require(expert % multiple == 0, "moe.expert_ratio", rule=rule, nearest=nearest):
        shared = cfg.moe.shared_experts * expert
        rule = f"must leave each rank a multiple of {unit}, of the shared experts' width {shared}"
        check.require(shared % (tp * multiple) == 0 or shared % tp != 0, "parallel.tp", rule=rule, nearest=1)
