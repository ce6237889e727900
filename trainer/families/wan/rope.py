"""RoPE of Wan 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..rope import RopeAdapter, RopePolicy, TemporalAxis, TemporalRope

ROPE_THETA = 10000.0  # of diffusers' WanRotaryPosEmbed; no config sets another
ROPE_DIM = 1  # the dimension of a table `[1, S, 1, D]` that counts tokens


def temporal_axis(head_dim: int) -> TemporalAxis:
    """Return the time axis: it has the channels that two spatial axes of `head_dim // 3`, rounded
    down to pairs, leave over."""
    return TemporalAxis(head_dim - 4 * (head_dim // 6), ROPE_THETA, torch.float64)


class WanRope(RopeAdapter):
    def extend(self, stock: Any, policy: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        axis = temporal_axis(config["attention_head_dim"])
        return TemporalRope(stock, policy, axis, patch=config["patch_size"][0], token_dim=ROPE_DIM)
