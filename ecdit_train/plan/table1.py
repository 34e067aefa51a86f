"""The printed parameter counts of the paper's Table 1, and how a plan compares with them."""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import ModelConfig, MoEConfig

SHAPES: dict[tuple[int, int, int, int], str] = {
    (28, 1152, 18, 6): "XL",
    (38, 1536, 24, 6): "XXL",
    (42, 2304, 36, 6): "3XL",
    (46, 3072, 48, 12): "M",
    (38, 3072, 48, 12): "M",
}
"""(layers, width, heads, kv_heads) -> row. The dense M has 46 layers, M-64E has 38."""

PRINTED: dict[tuple[str, int], tuple[float, float]] = {
    ("XL", 0): (1.47, 1.47),
    ("XL", 8): (2.51, 1.62),
    ("XL", 16): (3.70, 1.62),
    ("XL", 32): (6.08, 1.62),
    ("XXL", 0): (2.35, 2.35),
    ("XXL", 8): (4.87, 2.71),
    ("XXL", 16): (7.73, 2.71),
    ("XXL", 32): (13.47, 2.71),
    ("3XL", 0): (4.50, 4.50),
    ("3XL", 8): (10.74, 5.18),
    ("3XL", 16): (17.87, 5.18),
    ("3XL", 32): (32.15, 5.18),
    ("M", 0): (8.03, 8.03),
    ("M", 64): (97.21, 8.27),
}
"""(row, experts) -> (total, activated) in billions, as printed; experts = 0 is the dense column."""

NOTE_3XL = (
    "the printed 5.18B activated for 3XL does not follow from the paper's own rule (dense + one more feed-forward "
    "in each of 21 sparse layers is 5.39B); every other row does"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row of Table 1 next to what the network has; sizes in parameters, deviations relative."""

    row: str
    printed_total: float
    total_deviation: float
    printed_activated: float
    activated_deviation: float
    note: str | None


def compare(model: ModelConfig, moe: MoEConfig, *, total: int, activated: int) -> Comparison | None:
    """The row of Table 1 that this network is, or None. Token-choice baselines have no row, though their sizes are
    the same."""
    name = SHAPES.get((model.layers, model.width, model.heads, model.kv_heads))
    experts = 0 if moe.router == "dense" else moe.experts
    printed = PRINTED.get((name, experts)) if name and moe.router != "token_choice" else None
    if printed is None or (name == "M" and (model.layers == 46) != (experts == 0)):
        return None
    want_total, want_activated = printed[0] * 1e9, printed[1] * 1e9
    return Comparison(
        row=f"{name}-{experts}E" if experts else f"{name} dense",
        printed_total=want_total,
        total_deviation=total / want_total - 1,
        printed_activated=want_activated,
        activated_deviation=activated / want_activated - 1,
        note=NOTE_3XL if name == "3XL" and experts else None,
    )
