"""Query and key norms with rotary position embedding, as the families' transformers apply them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.norm_rope import norm_rope, rotate

__all__ = ["norm_and_rotate", "rotate"]


def norm_and_rotate(
    x: Tensor,
    norm: Any,
    cos: Tensor,
    sin: Tensor,
    *,
    text: Tensor | None = None,
    text_norm: Any = None,
    across_heads: bool = False,
    round_before_weight: bool = False,
) -> Tensor:
    """Compute `norm_rope` with the weights that the stock modules `norm` and `text_norm` hold.

    On a GPU one pass over memory replaces the norm, the rotation and the concatenation with text.
    The result is rounded as by the stock modules; gradients are rounded once, where theirs are
    rounded after every operation.
    """
    return norm_rope(
        x,
        norm.weight,
        cos,
        sin,
        eps=norm.eps,
        across_heads=across_heads,
        round_before_weight=round_before_weight,
        text=text,
        text_weight=None if text is None else text_norm.weight,
    )
