"""Full attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import SparsePattern


@dataclass(frozen=True)
class Dense(SparsePattern):
    """Lets every token attend to every token: the baseline, run as SDPA."""

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        return torch.ones(torch.broadcast_shapes(q.shape, kv.shape), dtype=torch.bool)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        n = -(-grid.video // block)
        return torch.ones(n, n, dtype=torch.bool)
