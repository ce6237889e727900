"""The two masks of Sparse VideoGen (Xi et al., ICML 2025, arXiv 2502.01776), fixed per head.

The paper chooses one of the two for each head and step from sampled queries; here the choice is the
recipe's. Where paper and released code differ this follows the paper: the first frame is kept under
both masks (the code keeps the first positions of the executed order, which for temporal heads are
a corner of every frame, and for HunyuanVideo nothing). The executed width is the code's, a band of
tokens, not the one of its profiling masks. A block is kept when any of its token pairs is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import SparsePattern


@dataclass(frozen=True)
class _Banded(SparsePattern):
    """A band of tokens around the diagonal of the frame-major or the token-major sequence."""

    width: ClassVar[str | None] = "half_width"

    half_width: float = 5.0
    sink: bool = True

    def __post_init__(self) -> None:
        if not self.half_width >= 0:
            raise ValueError(f"half_width={self.half_width} must be 0 or more frames.")

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        return 0.0, float(grid.frames)

    def _keep(self, grid: TokenGrid, q: Tensor, kv: Tensor, token_major: bool) -> Tensor:
        text = (q >= grid.video) | (kv >= grid.video)
        distance = (_place(grid, q, token_major) - _place(grid, kv, token_major)).abs()
        return text | (distance <= self._reach(grid)) | (self.sink & (kv < grid.per_frame))

    def _reach(self, grid: TokenGrid) -> int:
        return math.floor(min(self.half_width, grid.frames) * grid.per_frame)

    def _order(self, grid: TokenGrid, token_major: bool) -> Tensor:
        """The first frame ahead of the token-major rest if it is a sink: spread among the others
        it would have a token in every block, and keep them all."""
        raster = torch.arange(grid.video).view(grid.frames, grid.per_frame)
        if not token_major:
            return raster.flatten()
        first = int(self.sink)
        return torch.cat([raster[:first].flatten(), raster[first:].T.flatten()])

    def _blocks(self, grid: TokenGrid, block: int, token_major: bool) -> Tensor:
        place = _place(grid, self._order(grid, token_major), token_major)
        starts = torch.arange(0, grid.video, block)
        ends = (starts + block).clamp(max=grid.video)
        # Blocks of ascending places of which no two interleave: the nearest ends decide.
        low, high, reach = place[starts].int(), place[ends - 1].int(), self._reach(grid)
        near = low[None] - high[:, None] <= reach
        kept = near & near.T
        if not self.sink:
            return kept
        sink = -(-grid.per_frame // block)
        if token_major:  # the blocks that hold tokens of the first frame lie between all others
            for row in range(sink):
                queries = place[starts[row] : ends[row]].sort().values
                kept[row] = _reached(place, queries, reach, block)
        kept[:, :sink] = True
        return kept


@dataclass(frozen=True)
class Spatial(_Banded):
    """A band in frame-major order: a token sees its frame and those around it.

    The default is the paper's for HunyuanVideo, c_s = 10 of 33 frames, taken as the whole width: so
    read it keeps the 30 % that the paper states.

    half_width: frames (of any part: it is a number of tokens) either side.
    sink: all tokens attend to the whole first frame.
    """

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        return self._keep(grid, q, kv, token_major=False)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        return self._blocks(grid, block, token_major=False)


@dataclass(frozen=True)
class Temporal(_Banded):
    """A band in token-major order: a token sees raster positions near its own in all frames.

    Token k of frame i stands at k * frames + i. With a sink the first frame stands ahead of the
    others, which keep this order: the band is the same, and the sink is whole blocks. The default
    is the paper's for HunyuanVideo, c_t = 1,200 of 3,600 raster positions in 33 frames, read as the
    whole width.

    half_width: tokens either side, in frames' worth of them, as for `Spatial`.
    sink: all tokens attend to the whole first frame.
    """

    half_width: float = 5.5

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        return self._keep(grid, q, kv, token_major=True)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        return self._blocks(grid, block, token_major=True)

    def order(self, grid: TokenGrid, block: int) -> Tensor:
        return self._order(grid, token_major=True)


@dataclass(frozen=True)
class SpatialTemporal(_Banded):
    """Spatial heads beside temporal heads.

    half_width: of both bands, in frames' worth of tokens either side.
    sink: all tokens attend to the whole first frame.
    spatial_heads: share of the heads, the first ones, that are spatial; the others are temporal.
    """

    spatial_heads: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spatial_heads <= 1:
            raise ValueError(f"spatial_heads={self.spatial_heads} must be a share from 0 to 1.")

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        return self._keep(grid, q, kv, token_major=layout == 1)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Bool `[2, n, n]`: spatial, temporal."""
        return torch.stack([self._blocks(grid, block, major) for major in (False, True)])

    def order(self, grid: TokenGrid, block: int) -> Tensor:
        return torch.stack([self._order(grid, major) for major in (False, True)])

    def head_layouts(self, heads: int) -> list[int]:
        spatial = round(self.spatial_heads * heads)
        return [int(head >= spatial) for head in range(heads)]


def _place(grid: TokenGrid, raster: Tensor, token_major: bool) -> Tensor:
    """Where a token stands in the sequence that the band is drawn in."""
    if not token_major:
        return raster
    return raster % grid.per_frame * grid.frames + raster // grid.per_frame


def _reached(place: Tensor, queries: Tensor, reach: int, block: int) -> Tensor:
    """Blocks that hold a place within `reach` of one of the sorted `queries`: bool `[n]`."""
    after = torch.searchsorted(queries, place)
    last = queries.numel() - 1
    right = (queries[after.clamp(max=last)] - place).abs()
    left = (queries[(after - 1).clamp(min=0)] - place).abs()
    near = torch.minimum(left, right) <= reach
    padded = torch.zeros(-(-place.numel() // block) * block, dtype=torch.bool)
    padded[: place.numel()] = near
    return padded.view(-1, block).any(1)
