"""RoPE of Mochi 1: each head has learned its own frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..rope import NATIVE, RopeAdapter, RopePolicy

ROPE_DIM = 0  # the dimension of a table `[S, H, D / 2]` that counts tokens


class MochiRope(RopeAdapter):
    per_head = True

    def extend(self, stock: Any, policy: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        return QuietRope(stock, policy)


class QuietRope(nn.Module):
    """Computes the stock RoPE tables without the stock module's switch to an fp32 autocast.

    A CPU refuses that switch with a warning, and the arithmetic is in fp32 anyway. The policy
    scales temporal positions, which are raw indices of latent frames: the same as to interpolate
    each learned frequency.
    """

    def __init__(self, stock: Any, policy: RopePolicy = NATIVE) -> None:
        super().__init__()
        self.stock, self.policy = stock, policy

    def forward(
        self,
        pos_frequencies: Tensor,
        num_frames: int,
        height: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        positions = self.stock._get_positions(num_frames, height, width, device, dtype)
        positions[:, 0] *= self.policy.scale
        with torch.autocast(pos_frequencies.device.type, enabled=False):
            angles = torch.einsum("nd,dhf->nhf", positions.float(), pos_frequencies.float())
        return angles.cos(), angles.sin()
