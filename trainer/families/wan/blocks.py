"""Blocks of Wan 2.1 with chunked MLPs and fused norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....kernels.modulated_norm import gated_add, modulated_norm
from ..blocks import BlockAdapter, ChunkedFeedForward, Replacement, restore


class WanBlocks(BlockAdapter):
    fuses_modulation = True

    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        for block in transformer.blocks:
            block.ffn = ChunkedFeedForward(block.ffn, tokens)

    def fuse_modulation(self, transformer: Any, fused: bool) -> None:
        blocks = transformer.blocks
        for index, block in enumerate(blocks):
            stock = restore(block)
            blocks[index] = WanTransformerBlock(stock) if fused else stock


class WanTransformerBlock(Replacement):
    """The stock block except for its norms and gates, which are fused.

    It keeps the stock class's name, by which accelerate finds what to wrap (`_no_split_modules`)
    and diffusers what to compile (`_repeated_blocks`).
    """

    scale_shift_table: nn.Parameter
    norm1: Any
    attn1: Any
    norm2: Any
    attn2: Any
    norm3: Any
    ffn: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        if temb.ndim != 3:
            raise ValueError(
                "Wan's fused norms take one noise level a sample, not one a token; set "
                "speed.fused_modulation=false."
            )
        x = hidden_states
        modulation = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        normed = _layer_norm(x, self.norm1, 1 + scale, shift)
        x = gated_add(x, self.attn1(normed, None, None, rotary_emb), gate)
        if isinstance(self.norm2, nn.LayerNorm):
            normed = _layer_norm(x, self.norm2, self.norm2.weight, self.norm2.bias)
        else:
            normed = x
        x = x + self.attn2(normed, encoder_hidden_states, None, None)
        normed = _layer_norm(x, self.norm3, 1 + mlp_scale, mlp_shift)
        return gated_add(x, self.ffn(normed), mlp_gate)


def _layer_norm(x: Tensor, norm: Any, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return modulated_norm(x, scale, shift, norm="layer", eps=norm.eps)
