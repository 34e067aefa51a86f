"""Which blocks are checkpointed, and which ops backward does not run again. Imports no torch: the plan asks, too.

What is kept is kept op by op, by name; what a kind means depends on the module that an op runs in:

    attention       the attention itself, in self- and cross-attention
    projections     matrix products of the same: queries, keys, values and output
    feed_forward    matrix products of dense feed-forwards, shared experts among them
    experts         matrix products of experts, wherever they are issued inside of a sparse layer (not its router's)

Elementwise work (norms, modulation, GELU, the gathering of rows) is always repeated: it costs memory traffic, no FLOPs.
"""

from __future__ import annotations

from collections.abc import Collection

from ecdit_train.config.schema import Kept

DECISIONS = frozenset(
    {"aten::topk", "aten::nonzero", "aten::sort", "aten::kthvalue", "aten::masked_select", "ecdit::decided"}
)
"""Ops that decide about tokens. They are kept in every mode, `full` too: a recomputed logit that differs in its last bit may pick
another token (topk), or another number of them (nonzero), and the gradient would be of a network that nobody ran. What a router
decides by other means goes through `model.selecting.decided`. Small: a few bytes for each chosen token."""

EXCHANGES = frozenset(
    {
        "ecdit::expert_exchange",
        "_c10d_functional::all_gather_into_tensor",
        "_c10d_functional::all_to_all_single",
        "_c10d_functional::all_reduce",
    }
)
"""Kept by `selective`: again they would cost their traffic, two all-to-alls per sparse layer. `wait_tensor` must not be among
them: a wait on a kept result returns at once, while one that compiled code issues for its own in-place collective has to happen
(without it inductor's blocks gave wrong gradients under tp)."""

INSIDE = "ecdit::exchange_inside"

UNREAD = frozenset({INSIDE})
"""Ops that only feed a kept one (the first leg of a hierarchical exchange): not run again where that is
kept, nor kept themselves."""

PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm", "_scaled_mm_v2")
) | {"ecdit::te_product"}

ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "torch_attn::_varlen_attn",
        # Where no fused form takes the shapes, torch composes it: two batched products around a softmax.
        "aten::bmm",
        "aten::_softmax",
        "aten::_safe_softmax",
    }
)
"""Projections are never batched products, so that the two kinds do not meet."""


def kept_in_attention(keep: Collection[Kept]) -> frozenset[str]:
    """Names of the ops that an attention module keeps besides."""
    products = PRODUCTS - ATTENTION if "projections" in keep else frozenset[str]()
    return products | ATTENTION if "attention" in keep else products


def checkpointed(blocks: int, *, share: float) -> frozenset[int]:
    """Which of so many blocks of one sort (from 0): `share` of them, one at least, evenly over the depth."""
    number = max(1, round(share * blocks)) if blocks else 0
    return frozenset(i for i in range(blocks) if i * number // blocks != (i + 1) * number // blocks)
