"""One EC-DiT block: self-attention, text cross-attention, then a dense or sparse feed-forward, each on a residual.

Legend: B images, S tokens, D hidden width, Y text width.

Modulation (AdaLN): sublayer s of block l uses shift, scale and gate G_s(c) + L_l(c). G (6 D^2 parameters) is
shared by all blocks, L_l (3 D^2) by the two modulated sublayers of block l; a projection of 6 D^2 in every
block, as in DiT, does not fit the paper's parameter counts (docs/explanation/model.md) and is there for models
after DiT (`model.modulation=block`: L_ls alone). Norm and modulation are one kernel on CUDA in eager mode;
inductor fuses them itself.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ecdit_train.kernels.adaln import modulated_norm, norm_modulate

from .assignment import Assignment
from .attention import Attention, KeysValues
from .embed import Conditioning
from .feed_forward import FeedForward
from .moe import MoE


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        *,
        self_attention: Attention,
        cross_attention: Attention | None,
        feed_forward: FeedForward | MoE,
        modulations: Literal[3, 6],
    ) -> None:
        """`modulations`: vectors of the block's own AdaLN projection, 3 beside a shared one or 6 without."""
        super().__init__()
        self.modulation = nn.Linear(width, modulations * width)
        self.self_attention = self_attention
        self.norm_text = nn.LayerNorm(width) if cross_attention is not None else None
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def keys_values(self, text_BLY: Tensor) -> KeysValues | None:
        """What cross-attention makes of the text (`embed.Prompt`)."""
        return None if self.cross_attention is None else self.cross_attention.keys_values(text_BLY)

    def forward(self, x_BSD: Tensor, c: Conditioning, *, group_tokens: int) -> tuple[Tensor, Assignment | None]:
        """Returns the tokens and, from a sparse block, who took what."""
        B, _, D = x_BSD.shape
        own_Bs3D = self.modulation(c.vector_BD).view(B, -1, 3, D)
        all_B23D = own_Bs3D if c.shared_B6D is None else c.shared_B6D.view(B, 2, 3, D) + own_Bs3D
        attention_B3D, ffn_B3D = all_B23D.unbind(1)

        shift, scale, gate = attention_B3D.unbind(1)
        h = modulated_norm(x_BSD, shift_BD=shift, scale_BD=scale)
        x_BSD = x_BSD + gate[:, None] * self.self_attention(h, context=h)

        if self.cross_attention is not None:
            assert self.norm_text is not None
            assert c.text_BLY is not None
            x_BSD = x_BSD + self.cross_attention(self.norm_text(x_BSD), context=c.text_BLY, mask_BL=c.text_mask_BL)

        shift, scale, gate = ffn_B3D.unbind(1)
        if isinstance(self.feed_forward, MoE):
            normed, h = norm_modulate(x_BSD, shift_BD=shift, scale_BD=scale)
            y, assignment = self.feed_forward(
                h, normed_BSD=normed, hidden_BSD=x_BSD, timestep_BD=c.timestep_BD, group_tokens=group_tokens
            )
        else:
            y, assignment = self.feed_forward(modulated_norm(x_BSD, shift_BD=shift, scale_BD=scale)), None
        return x_BSD + gate[:, None] * y, assignment
