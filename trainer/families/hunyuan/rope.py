"""RoPE of HunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..rope import RopeAdapter, RopePolicy, TemporalAxis, TemporalRope

ROPE_DIM = 0  # the dimension of a table `[S, D]` that counts tokens


def temporal_axis(config: Mapping[str, Any]) -> TemporalAxis:
    """Return the time axis, from the transformer's config."""
    dim = config.get("rope_axes_dim", (16, 56, 56))[0]
    return TemporalAxis(dim, config.get("rope_theta", 256.0), torch.float32)


class HunyuanRope(RopeAdapter):
    def extend(self, stock: Any, policy: RopePolicy, config: Mapping[str, Any]) -> nn.Module:
        axis, patch = temporal_axis(config), config["patch_size_t"]
        return TemporalRope(stock, policy, axis, patch=patch, token_dim=ROPE_DIM)
