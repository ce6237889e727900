"""Rotary position embedding as the families' transformers apply it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs of `[B, S, H, D]`; cos and sin broadcast to `[B, S, H, D / 2]`.

    Computed in the tables' fp32, each element rounded once.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack([part.type_as(x) for part in rotated], dim=-1).flatten(-2)
