"""One EC-DiT block: self-attention, text cross-attention, then a dense or sparse feed-forward, each on a residual.

Legend: B images, S tokens, D hidden width, Y text width.

Modulation (AdaLN): sublayer s of block l uses shift, scale and gate G_s(c) + L_l(c). G (6 D^2 parameters) is shared by
all blocks, L_l (3 D^2) by the two modulated sublayers of block l; a projection of 6 D^2 in every block, as in DiT, does
not fit the paper's parameter counts (docs/explanation/model.md).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .assignment import Assignment
from .attention import Attention
from .embed import Conditioning
from .feed_forward import FeedForward
from .moe import MoE


def modulate(x_BSD: Tensor, *, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift."""
    return F.layer_norm(x_BSD, x_BSD.shape[-1:]) * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Block(nn.Module):
    def __init__(
        self, width: int, *, self_attention: Attention, cross_attention: Attention, feed_forward: FeedForward | MoE
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.self_attention = self_attention
        self.norm_text = nn.LayerNorm(width)
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def forward(self, x_BSD: Tensor, c: Conditioning, *, group_tokens: int) -> tuple[Tensor, Assignment | None]:
        """Returns the tokens and, from a sparse block, who took what."""
        B, _, D = x_BSD.shape
        local_B13D = self.modulation(c.vector_BD).view(B, 1, 3, D)
        attention_B3D, ffn_B3D = (c.shared_B6D.view(B, 2, 3, D) + local_B13D).unbind(1)

        shift, scale, gate = attention_B3D.unbind(1)
        h = modulate(x_BSD, shift_BD=shift, scale_BD=scale)
        x_BSD = x_BSD + gate[:, None] * self.self_attention(h, context=h)

        x_BSD = x_BSD + self.cross_attention(self.norm_text(x_BSD), context=c.text_BLY, mask_BL=c.text_mask_BL)

        shift, scale, gate = ffn_B3D.unbind(1)
        h = modulate(x_BSD, shift_BD=shift, scale_BD=scale)
        if isinstance(self.feed_forward, MoE):
            y, assignment = self.feed_forward(h, group_tokens=group_tokens)
        else:
            y, assignment = self.feed_forward(h), None
        return x_BSD + gate[:, None] * y, assignment
