"""`Tiling`: 3-D tiles of video tokens, each a run of consecutive positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..grid import TokenGrid

Triple = tuple[int, int, int]


def parse_triple(name: str, text: str) -> Triple:
    """Parse `6x8x8` as frames, height and width.

    Raises:
        ValueError: if `text` is malformed; the message names the setting `name`.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    frames, height, width = map(int, match.groups()) if match else (0, 0, 0)
    if min(frames, height, width) < 1:
        raise ValueError(
            f"{name}={text} must be three sizes of at least 1, frames x height x width, "
            "such as 6x8x8."
        )
    return frames, height, width


@dataclass(frozen=True)
class Tiling:
    """Cuts `grid` into tiles of `size`; those at the far borders may be smaller.

    Whole tiles come first, so that they begin at multiples of their volume, then the smaller ones,
    both frame by frame and row by row. Within a tile tokens are in raster order.
    """

    grid: TokenGrid
    size: Triple

    @property
    def sides(self) -> Triple:
        """The size of the grid in tokens: frames, height, width."""
        return self.grid.frames, self.grid.height, self.grid.width

    @property
    def counts(self) -> Triple:
        """The number of tiles along each axis, smaller ones included."""
        pairs = zip(self.sides, self.size, strict=True)
        frames, height, width = (-(-side // tile) for side, tile in pairs)
        return frames, height, width

    @property
    def volume(self) -> int:
        """The number of tokens of a whole tile."""
        return prod(self.size)

    def tile_of(self, raster: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tile of each raster position, as its place along the three axes."""
        _, height, width = self.sides
        t, y, x = raster // (height * width), raster // width % height, raster % width
        return t // self.size[0], y // self.size[1], x // self.size[2]

    @cached_property
    def order(self) -> Tensor:
        """The raster position of the token at each position, int64 `[video]`."""
        return torch.argsort(self._keys, stable=True)

    @cached_property
    def offsets(self) -> Tensor:
        """The position at which each tile begins, then the end, int64 `[tiles + 1]`."""
        sizes = self._keys.unique(return_counts=True)[1]
        return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    @cached_property
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """The place of each tile on the three axes, in the tiles' order: int64 `[tiles]` each."""
        return self.tile_of(self.order[self.offsets[:-1]])

    @cached_property
    def _keys(self) -> Tensor:
        """The sort key that orders tokens by tile, by raster position: int64 `[video]`."""
        places = self.tile_of(torch.arange(self.grid.video))
        key, ragged = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.bool)
        for place, side, tile, count in zip(
            places, self.sides, self.size, self.counts, strict=True
        ):
            key = key * count + place
            ragged = ragged | (place >= side // tile)
        return key + ragged * prod(self.counts)
