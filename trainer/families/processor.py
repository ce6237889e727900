"""What the families' attention processors have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ...sparse.attention import SparseAttention


@dataclass(eq=False)
class LayerProcessor:
    """Attention processor of one layer: the stock one's arithmetic around `SparseAttention`.

    layer_index: in the order that layers run. fused_norms: norms and RoPE by `norm_rope`.
    """

    layer_index: int
    attention: SparseAttention
    fused_norms: bool
