"""Small patterns for the machinery: random blocks, orders and layouts, and one with a width."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from longreel.sparse.patterns import SparsePattern


@dataclass(frozen=True)
class Scattered(SparsePattern):
    """Random blocks under random orders; `keep` is what its blocks say, token by token.

    orders: of each layout, "raster", "shared" (one permutation) or "own". Head h follows layout
    `heads[h % len(heads)]`.
    """

    orders: tuple[str, ...] = ("raster",)
    heads: tuple[int, ...] = (0,)
    share: float = 0.2
    seed: int = 0

    def blocks(self, grid, block):
        n = math.ceil(grid.video / block)
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.rand(len(self.orders), n, n, generator=generator) < self.share
        return kept | torch.eye(n, dtype=torch.bool)

    def order(self, grid, block):
        generator = torch.Generator().manual_seed(self.seed + 1)
        shared = torch.randperm(grid.video, generator=generator)
        made = {
            "raster": lambda: torch.arange(grid.video),
            "shared": lambda: shared,
            "own": lambda: torch.randperm(grid.video, generator=generator),
        }
        return torch.stack([made[name]() for name in self.orders])

    def head_layouts(self, heads):
        return [self.heads[head % len(self.heads)] for head in range(heads)]

    def keep(self, grid, q, kv, block=128, layout=0):
        position = self.order(grid, block)[layout].argsort()
        position = torch.cat([position, torch.zeros(grid.text, dtype=torch.int64)])
        kept = self.blocks(grid, block)[layout]
        text = (q >= grid.video) | (kv >= grid.video)
        return text | kept[position[q] // block, position[kv] // block]


@dataclass(frozen=True)
class Slashes(SparsePattern):
    """Blocks within a whole number of diagonals, in raster order and time first."""

    diagonals: int = 1
    width: ClassVar[str | None] = "diagonals"

    def blocks(self, grid, block):
        index = torch.arange(math.ceil(grid.video / block))
        return (index[:, None] - index).abs() <= self.diagonals

    def order(self, grid, block):
        raster = torch.arange(grid.video)
        return torch.stack([raster, raster.view(grid.frames, grid.per_frame).T.flatten()])

    def head_layouts(self, heads):
        return [head % 2 for head in range(heads)]

    def keep(self, grid, q, kv, block=128, layout=0):
        s, f = grid.per_frame, grid.frames
        place = [(x % s * f + x // s if layout else x) // block for x in (q, kv)]
        text = (q >= grid.video) | (kv >= grid.video)
        return text | ((place[0] - place[1]).abs() <= self.diagonals)

    def with_width(self, value, grid, block):
        return Slashes(round(value))

    def widths(self, grid, block):
        return 0, math.ceil(grid.video / block) - 1
