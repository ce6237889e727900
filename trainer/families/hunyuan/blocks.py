"""Blocks of HunyuanVideo with chunked MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockAdapter, ChunkedFeedForward, chunked


class HunyuanBlocks(BlockAdapter):
    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        for block in transformer.transformer_blocks:  # the text's is at most 256 tokens long
            block.ff = ChunkedFeedForward(block.ff, tokens)
        singles = transformer.single_transformer_blocks
        for index, block in enumerate(singles):
            singles[index] = ChunkedSingleBlock(block, tokens)


class ChunkedSingleBlock(nn.Module):
    """The stock single-stream block with a chunked MLP; it adopts the stock block's children.

    The stock block holds the MLP's hidden layer, four times as wide as the model, and a second
    copy of it concatenated with attention's output, for the one projection that both share: 5.7
    and 7.1 GB in bf16 for 230,400 tokens. Here both are a chunk long.
    """

    def __init__(self, stock: Any, tokens: int) -> None:
        super().__init__()
        self.attn, self.norm, self.proj_mlp = stock.attn, stock.norm, stock.proj_mlp
        self.act_mlp, self.proj_out = stock.act_mlp, stock.proj_out
        self.tokens = tokens

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        normed, gate = self.norm(joint, emb=temb)
        video, text = normed.split(lengths, dim=1)
        attended = self.attn(video, text, attention_mask, image_rotary_emb=image_rotary_emb)
        out = chunked(self._project, self.tokens, normed, torch.cat(attended, dim=1))
        video, text = (gate.unsqueeze(1) * out + joint).split(lengths, dim=1)
        return video, text

    def _project(self, normed: Tensor, attended: Tensor) -> Tensor:
        inside = self.act_mlp(self.proj_mlp(normed))
        return self.proj_out(torch.cat([attended, inside], dim=2))
