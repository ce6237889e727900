"""Attention of HunyuanVideo, over video and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....sparse.attention import SparseAttention
from ..attention import LayerProcessor
from ..joint import JointAttention
from ..norm_rope import norm_and_rotate, rotate
from .geometry import patch_size


class HunyuanAttention(JointAttention):
    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        # The token refiner's attention, over text alone, stays as it is.
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for index, block in enumerate(blocks):
            block.attn.set_processor(HunyuanJointAttention(index, attention, fused_norms))

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return patch_size(config)


class HunyuanJointAttention(LayerProcessor):
    """`HunyuanVideoAttnProcessor2_0` around `SparseAttention`.

    In a dual block the text has projections of its own, in a single block it shares the video's.
    The mask that the model builds is ignored: the plan knows the lengths, and a mask would cost
    SDPA its fused kernels.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        video, text = hidden_states, encoder_hidden_states
        lengths, dual = [video.shape[1], text.shape[1]], attn.add_q_proj is not None
        if not dual:
            video = torch.cat([video, text], dim=1)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (project(video).unflatten(2, (attn.heads, -1)) for project in projections)
        tq = tk = None
        if dual:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = (project(text).unflatten(2, (attn.heads, -1)) for project in projections)
            v = torch.cat([v, tv], dim=1)
        # Each value comes twice, for a pair; text has no position.
        cos, sin = (table[:, 0::2] for table in image_rotary_emb)
        norm = self._fused if self.fused_norms else self._stock
        q = norm(q, attn.norm_q, cos, sin, tq, attn.norm_added_q)
        k = norm(k, attn.norm_k, cos, sin, tk, attn.norm_added_k)
        out = self.attention.attention(self.layer_index, q, k, v).flatten(2)
        video, text = out.split(lengths, dim=1)
        if dual:
            for module in attn.to_out:
                video = module(video)
            text = attn.to_add_out(text)
        return video, text

    def _stock(
        self, x: Tensor, norm: Any, cos: Tensor, sin: Tensor, text: Tensor | None, text_norm: Any
    ) -> Tensor:
        """Apply the norms and the video's RoPE, and append the text, module by module."""
        x, video = norm(x), len(cos)
        rest = x[:, video:] if text is None else text_norm(text)
        return torch.cat([rotate(x[:, :video], cos[:, None], sin[:, None]), rest], dim=1)

    def _fused(
        self, x: Tensor, norm: Any, cos: Tensor, sin: Tensor, text: Tensor | None, text_norm: Any
    ) -> Tensor:
        """Compute `_stock` in one kernel."""
        return norm_and_rotate(
            x, norm, cos, sin, text=text, text_norm=text_norm, round_before_weight=True
        )
