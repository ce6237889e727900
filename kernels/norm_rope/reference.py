"""The eager twin of the kernels: it rounds where diffusers' modules round, and runs anywhere."""

import torch
from torch import Tensor


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    text: Tensor | None,
    text_weight: Tensor | None,
    eps: float,
    across_heads: bool,
    round_before_weight: bool,
) -> Tensor:
    """Compute `op.norm_rope` with PyTorch operations; shapes and meanings are the same."""
    x = _normed(x, weight, eps, across_heads, round_before_weight)
    if cos.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    parts = [rotate(x[:, : len(cos)], cos, sin), x[:, len(cos) :]]
    if text is not None:
        parts.append(_normed(text, text_weight, eps, across_heads, round_before_weight))
    return torch.cat(parts, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the interleaved channel pairs of x `[B, S, H, D]`.

    The rotation is computed in the tables' fp32, and each element is rounded once.

    cos, sin: tables that broadcast to `[B, S, H, D / 2]`.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack([part.type_as(x) for part in rotated], dim=-1).flatten(-2)


def _normed(
    x: Tensor, weight: Tensor | None, eps: float, across_heads: bool, round_before_weight: bool
) -> Tensor:
    """Apply RMS norm to `[B, S, H, D]` over D, or over H and D together, with fp32 statistics."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    over = (2, 3) if across_heads else (3,)
    normed = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    if weight is not None:
        normed = normed.to(x.dtype) if round_before_weight else normed
        normed = normed * (weight.view(x.shape[2:]) if across_heads else weight)
    return normed.to(x.dtype)
