"""The eager twins of the kernels: they round where diffusers' modules round, and run anywhere."""

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated_norm(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, layer: bool, eps: float
) -> Tensor:
    """Compute `op.modulated_norm` with PyTorch operations; scale and shift are [B or 1, C]."""
    wide = _wide(x)
    if layer:
        wide = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    else:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if scale is not None:
        wide = wide * scale[:, None]
    if shift is not None:
        wide = wide + shift[:, None]
    return wide.to(x.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute `op.gated_add` with PyTorch operations; gate is [B or 1, C]."""
    return (_wide(x) + _wide(y) * gate[:, None]).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float64 else x.float()
