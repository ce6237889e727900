"""Sliding Tile Attention (Zhang et al., ICML 2025, arXiv 2502.04507)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import SparsePattern
from .rules import any_of_units
from .tiles import Tiling, Triple, parse_triple

EARLY = (
    -2 / 3,
    0.0,
    2 / 3,
)  # tiles added to frames, height and width so that they round up in turn


@dataclass(frozen=True)
class SlidingTile(SparsePattern):
    """Lets a 3-D tile of tokens see the same number of tiles in a window around it everywhere.

    At the borders the window moves inwards instead of losing tiles; a window as large as an axis
    covers it. Tokens are ordered tile by tile, whole tiles first, then the smaller ones at the far
    borders, where the paper pads the video to whole tiles instead. A block that holds tokens of
    several tiles is kept if any pair of tiles is. If the volume of a tile is a multiple of the
    block, that happens only at the borders; `note` says so if it is not.

    tile: size of a tile in tokens, frames x height x width.
    windows: size of the window in tiles, odd along each axis. Several windows, separated by commas
        or blanks, are dealt to the heads in turn; with as many windows as heads each head has one.
    """

    width: ClassVar[str | None] = "windows"

    tile: str = "6x8x8"
    windows: str = "3x3x3"

    def __post_init__(self) -> None:
        parse_triple("tile", self.tile)
        self._per_head()

    def _per_head(self) -> list[Triple]:
        """Return the windows that are dealt to the heads in turn."""
        windows = [
            parse_triple("windows", text) for text in re.split(r"[,\s]+", self.windows.strip())
        ]
        for window in windows:
            if any(size % 2 == 0 for size in window):
                raise ValueError(
                    f"windows={self.windows}: {_text(window)} must be odd along each axis, so that "
                    "a tile stands in the middle of its window."
                )
        return windows

    def _layouts(self) -> list[Triple]:
        """Return the different windows, in the order in which they first appear."""
        return list(dict.fromkeys(self._per_head()))

    def _tiling(self, grid: TokenGrid) -> Tiling:
        return Tiling(grid.without_text(), parse_triple("tile", self.tile))

    def note(self, grid: TokenGrid, block: int) -> str | None:
        """Return a sentence for the user if blocks and tiles are not aligned, else None."""
        volume = self._tiling(grid).volume
        if volume % block == 0:
            return None
        return (
            f"tile={self.tile} is {volume} tokens, not a multiple of block={block}: blocks that "
            "hold parts of several tiles keep the windows of all of them."
        )

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        tiling, window = self._tiling(grid), self._layouts()[layout]
        kept = (q >= grid.video) | (kv >= grid.video)
        axes = zip(tiling.tile_of(q), tiling.tile_of(kv), tiling.counts, window, strict=True)
        near = [_sees(a, b, count, size) for a, b, count, size in axes]
        return kept | (near[0] & near[1] & near[2])

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Return bool `[layouts, n, n]`, one layout for each different window."""
        tiling = self._tiling(grid)
        return torch.stack([_blocks(tiling, window, block) for window in self._layouts()])

    def order(self, grid: TokenGrid, block: int) -> Tensor:
        return self._tiling(grid).order

    def head_layouts(self, heads: int) -> Sequence[int]:
        windows, layouts = self._per_head(), self._layouts()
        return [layouts.index(windows[head % len(windows)]) for head in range(heads)]

    def with_width(self, value: float, grid: TokenGrid, block: int) -> Self:
        """Return the pattern with all windows scaled by `value` to odd numbers of tiles.

        Width rounds up first, then height, then frames: three small steps instead of a large one.
        """

        def scaled(window: Triple) -> str:
            lengths = (size * value + early for size, early in zip(window, EARLY, strict=True))
            return "x".join(str(2 * max(0, int(length / 2)) + 1) for length in lengths)

        return replace(self, windows=" ".join(map(scaled, self._per_head())))

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        """Return the scales at which windows are single tiles and the whole video.

        There are few densities between them, because an axis grows by two tiles at a time.
        """
        windows, counts = self._per_head(), self._tiling(grid).counts
        return 1 / max(map(max, windows)), (max(counts) + 1) / min(map(min, windows))


def _text(window: Triple) -> str:
    return "x".join(map(str, window))


def _sees(query: Tensor, key: Tensor, count: int, window: int) -> Tensor:
    """Return whether tile `query` sees tile `key` along an axis of `count` tiles."""
    if window >= count:
        return torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
    half = window // 2
    return (query.clamp(half, count - 1 - half) - key).abs() <= half


def _blocks(tiling: Tiling, window: Triple, block: int) -> Tensor:
    tables = []
    for count, size in zip(tiling.counts, window, strict=True):
        index = torch.arange(count)
        tables.append(_sees(index[:, None], index[None], count, size))

    def kept(rows: slice) -> Tensor:
        t, y, x = (
            table[place[rows]][:, place]
            for table, place in zip(tables, tiling.coordinates, strict=True)
        )
        return t & y & x

    return any_of_units(tiling.offsets, block, kept)
