"""The experiments race_{b,m,l,xl} have the sizes that the Race paper prints (its Table of configurations), to 1 %.

The table counts the blocks: what lies around them (embeddings, output layer, a few million) differs between a class-conditional
network and this one. The target heads of the per-layer regularisation are dropped at inference and not counted.
"""

from __future__ import annotations

import pytest

from ecdit_train.config.compose import compose
from ecdit_train.plan import slots

PRINTED = {
    "race_b": (0.127, 0.531, 0.135),
    "race_m": (0.265, 1.106, 0.281),
    "race_l": (0.453, 1.889, 0.479),
    "race_xl": (0.669, 2.788, 0.707),
}
"""Billions: dense, 4-in-32, and of these activated."""


def blocks(*words: str) -> tuple[int, int]:
    """(all, activated) parameters of the blocks."""
    config = compose(list(words), local=False)
    total = experts = 0
    for name, p in slots.network(config).named_parameters():
        if name.startswith("blocks.") and not name.endswith("router.target"):
            total += p.numel()
            experts += p.numel() if ".experts." in name else 0
    share = slots.experts_per_token(config) / max(config.moe.num_experts, 1)
    return total, round(total - experts * (1 - share))


@pytest.mark.parametrize("name", PRINTED)
def test_sizes(name: str) -> None:
    dense, total, activated = PRINTED[name]
    assert blocks(f"experiment={name}", "moe=dense")[0] / 1e9 == pytest.approx(dense, rel=0.01)
    assert blocks(f"experiment={name}") == (
        pytest.approx(total * 1e9, rel=0.01),
        pytest.approx(activated * 1e9, rel=0.01),
    )
