"""Blocks of Mochi 1 with chunked MLPs and fused norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....kernels.modulated_norm import modulated_norm
from ..blocks import BlockAdapter, ChunkedFeedForward, Replacement, restore


class MochiBlocks(BlockAdapter):
    fuses_modulation = True

    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        for block in transformer.transformer_blocks:  # the text's is at most 256 tokens long
            block.ff = ChunkedFeedForward(block.ff, tokens)

    def fuse_modulation(self, transformer: Any, fused: bool) -> None:
        for block in transformer.transformer_blocks:  # the text's are of 256 tokens at most
            norms = [restore(norm) for norm in (block.norm1, block.norm2, block.norm3, block.norm4)]
            if fused:
                norms = [MochiZeroNorm(norms[0]), *map(MochiNorm, norms[1:])]
            block.norm1, block.norm2, block.norm3, block.norm4 = norms


class MochiNorm(Replacement):
    """Computes `MochiModulatedRMSNorm` in one pass."""

    norm: Any

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
        return modulated_norm(hidden_states, scale, norm="rms", eps=self.norm.eps)


class MochiZeroNorm(Replacement):
    """Computes `MochiRMSNormZero` in one pass."""

    silu: Any
    linear: Any
    norm: Any

    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, gate, mlp_scale, mlp_gate = self.linear(self.silu(emb)).chunk(4, dim=1)
        normed = modulated_norm(hidden_states, 1 + scale.float(), norm="rms", eps=self.norm.eps)
        return normed, gate, mlp_scale, mlp_gate
