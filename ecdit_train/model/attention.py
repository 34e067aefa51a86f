"""Multi-head attention with grouped key/value heads; one module for self-attention and text cross-attention.

Legend: B batch, S queries, T keys, D width of the queries' stream, Y width of the context, h heads, k key/value heads,
d = 64 channels per head. The number of heads is read off the projections' output, so that a tensor-parallel rank
holding some of the heads runs the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class KeysValues:
    """A context that an attention layer has projected already: for one that many calls share."""

    key_BkTd: Tensor
    value_BkTd: Tensor


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, heads concatenated, then the output projection (paper eq. 2 and 3); no biases."""

    def __init__(self, width: int, *, context_width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(context_width, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(context_width, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def keys_values(self, context_BTY: Tensor) -> KeysValues:
        """What `forward` makes of a context; under tensor parallelism this rank's heads."""
        key, value = (self._heads(project(context_BTY)) for project in (self.key, self.value))
        return KeysValues(key_BkTd=key, value_BkTd=value)

    def _heads(self, z_BSD: Tensor) -> Tensor:
        return rearrange(z_BSD, "b s (h d) -> b h s d", d=self.head_dim)

    def forward(self, x_BSD: Tensor, *, context: Tensor | KeysValues, mask_BL: Tensor | None = None) -> Tensor:
        """x: (B, S, D), context: (B, T, Y) or what `keys_values` made of it, mask: (B, T) with True where a key may be seen.
        Returns (B, S, D)."""
        q = self._heads(self.query(x_BSD))
        seen = context if isinstance(context, KeysValues) else self.keys_values(context)
        k, v = seen.key_BkTd, seen.value_BkTd
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(rearrange(y, "b h s d -> b s (h d)"))
