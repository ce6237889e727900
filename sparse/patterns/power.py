"""PowerAttention (Chen et al., arXiv 2503.03588), made symmetric for video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import SparsePattern


@dataclass(frozen=True)
class Power(SparsePattern):
    """Lets a block see itself, its neighbours, and the blocks a power of two away.

    The pattern is defined on blocks, so it needs no rule to form them. A block is kept where the
    distance |q - kv| in blocks is 0, a power of two or at most `window`, and where kv is among the
    first `sink` blocks. The paper's pattern is causal, with blocks of 256 tokens; here blocks look
    both ways, since video attention is not causal. Any block reaches any other within log2 n
    layers.

    window: blocks on either side (5 in the paper).
    sink: number of first blocks that all blocks attend to (1 in the paper).
    """

    width: ClassVar[str | None] = "window"

    window: int = 5
    sink: int = 1

    def __post_init__(self) -> None:
        for name in ("window", "sink"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more blocks.")

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        text = (q >= grid.video) | (kv >= grid.video)
        return text | self._kept(q // block, kv // block)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        index = torch.arange(-(-grid.video // block), dtype=torch.int32)
        return self._kept(index[:, None], index[None])

    def _kept(self, q: Tensor, kv: Tensor) -> Tensor:
        distance = (q - kv).abs()
        power = distance & (distance - 1) == 0  # a power of two, or 0
        return power | (distance <= self.window) | (kv < self.sink)

    def with_width(self, value: float, grid: TokenGrid, block: int) -> Self:
        return super().with_width(round(value), grid, block)

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        return 0, -(-grid.video // block) - 1
