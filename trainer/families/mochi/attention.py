"""Attention of Mochi 1, over video and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....sparse.attention import SparseAttention
from ..attention import LayerProcessor
from ..joint import JointAttention
from ..norm_rope import norm_and_rotate, rotate
from .geometry import patch_size
from .rope import QuietRope


class MochiAttention(JointAttention):
    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        for index, block in enumerate(transformer.transformer_blocks):
            # The stock module has no setter.
            block.attn1.processor = MochiJointAttention(index, attention, fused_norms)
        if not isinstance(transformer.rope, QuietRope):
            transformer.rope = QuietRope(transformer.rope)

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return patch_size(config)


class MochiJointAttention(LayerProcessor):
    """`MochiAttnProcessor2_0` around `SparseAttention`.

    The stock processor loops over the samples and cuts their padding off; here the plan knows the
    lengths.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = _heads(attn, encoder_hidden_states, *text_layers)
        # cos and sin are [S, H, D / 2]: every head has learned its own frequencies.
        if self.fused_norms:
            added_q, added_k = attn.norm_added_q, attn.norm_added_k
            q = norm_and_rotate(q, attn.norm_q, *image_rotary_emb, text=text_q, text_norm=added_q)
            k = norm_and_rotate(k, attn.norm_k, *image_rotary_emb, text=text_k, text_norm=added_k)
            v = torch.cat([v, text_v], dim=1)
        else:
            # In fp32 from the start, so that the gradients of the two products that each element is
            # in meet in fp32.
            q, k = (
                rotate(norm(x).float(), *image_rotary_emb).type_as(v)
                for norm, x in ((attn.norm_q, q), (attn.norm_k, k))
            )
            text = (attn.norm_added_q(text_q), attn.norm_added_k(text_k), text_v)
            q, k, v = (
                torch.cat([x, _gathered(y)], dim=1) for x, y in zip((q, k, v), text, strict=True)
            )
        out = self.attention.attention(self.layer_index, q, k, v).flatten(2)
        video, context = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        for module in attn.to_out:
            video = module(video)
        # The last block's text goes nowhere, and it has no projection for it.
        return video, context if attn.context_pre_only else attn.to_add_out(context)


def _heads(attn: Any, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return each projection `[B, S, H, D]` of `[B, S, C]`."""
    return [layer(x).unflatten(2, (attn.heads, -1)) for layer in layers]


def _gathered(text: Tensor) -> Tensor:
    """Return `[B, S, H, D]` unchanged, with gradients that lie head after head in memory.

    So do those of the stock model's gathered tokens, and sums over them are then the same to the
    bit. Only the text is copied, at most 256 tokens of a sequence of 44,520 and more.
    """
    every = torch.arange(text.shape[1], device=text.device)
    return text.transpose(1, 2).index_select(2, every).transpose(1, 2)
