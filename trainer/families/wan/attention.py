"""Self-attention of Wan 2.1, over the video alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....sparse.attention import SparseAttention
from ....sparse.grid import TokenGrid
from ..attention import AttentionAdapter, LayerProcessor
from ..geometry import token_grid
from ..norm_rope import norm_and_rotate, rotate


class WanAttention(AttentionAdapter):
    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        for index, block in enumerate(transformer.blocks):
            block.attn1.set_processor(WanSelfAttention(index, attention, fused_norms))

    def sequence(
        self, transformer: Any, inputs: Mapping[str, Any]
    ) -> tuple[TokenGrid, Sequence[int] | None]:
        return token_grid(inputs["hidden_states"].shape, transformer.config.patch_size), None


class WanSelfAttention(LayerProcessor):
    """`WanAttnProcessor` for self-attention, around `SparseAttention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        if not self.fused_norms:
            # The norms span all heads, so they come before the split.
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]  # each value comes twice
        if self.fused_norms:
            tables = cos[0, :, 0], sin[0, :, 0]
            q = norm_and_rotate(q, attn.norm_q, *tables, across_heads=True)
            k = norm_and_rotate(k, attn.norm_k, *tables, across_heads=True)
        else:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.attention.attention(self.layer_index, q, k, v).flatten(2)
        for module in attn.to_out:
            out = module(out)
        return out
