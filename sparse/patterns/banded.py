"""The two masks of Sparse VideoGen (Xi et al., ICML 2025, arXiv 2502.01776), fixed per head.

The paper chooses one of the two for each head and step from sampled queries; here the recipe
chooses. Where paper and released code differ, this file follows the paper: the first frame is kept
under both masks. (The code keeps the first positions of the executed order: for temporal heads they
are a corner of every frame, for HunyuanVideo there are none.) The width is the one that the code
executes, a band of tokens, not that of its profiling masks. A block is kept when any of its token
pairs is.
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
    """Keeps a band of tokens around the diagonal of the frame-major or token-major sequence."""

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
        return (
            text | (distance <= self._half_width_tokens(grid)) | (self.sink & (kv < grid.per_frame))
        )

    def _half_width_tokens(self, grid: TokenGrid) -> int:
        return math.floor(min(self.half_width, grid.frames) * grid.per_frame)

    def _order(self, grid: TokenGrid, token_major: bool) -> Tensor:
        """Return the raster positions in executed order.

        In token-major order a first frame that is a sink comes ahead of the others: spread among
        them it would have a token in every block, so that all blocks were kept.
        """
        raster = torch.arange(grid.video).view(grid.frames, grid.per_frame)
        if not token_major:
            return raster.flatten()
        first = int(self.sink)
        return torch.cat([raster[:first].flatten(), raster[first:].T.flatten()])

    def _blocks(self, grid: TokenGrid, block: int, token_major: bool) -> Tensor:
        place = _place(grid, self._order(grid, token_major), token_major)
        starts = torch.arange(0, grid.video, block)
        ends = (starts + block).clamp(max=grid.video)
        # Places ascend within and across blocks, so the nearest ends of two blocks decide.
        low, high, limit = place[starts].int(), place[ends - 1].int(), self._half_width_tokens(grid)
        near = low[None] - high[:, None] <= limit
        kept = near & near.T
        if not self.sink:
            return kept
        sink = -(-grid.per_frame // block)
        if token_major:  # the first frame's places lie between all others
            for row in range(sink):
                queries = place[starts[row] : ends[row]].sort().values
                kept[row] = _blocks_near(place, queries, limit, block)
        kept[:, :sink] = True
        return kept


@dataclass(frozen=True)
class Spatial(_Banded):
    """Keeps a band in frame-major order: a token sees its own frame and those around it.

    The default is the paper's for HunyuanVideo, c_s = 10 of 33 frames, read as the whole width:
    that keeps the 30 % which the paper states.

    half_width: tokens on either side, in frames; fractions are allowed.
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
    """Keeps a band in token-major order: a token sees raster positions near its own in all frames.

    Token k of frame i stands at k * frames + i. With a sink, the first frame stands ahead of the
    others, which keep this order: the band is the same, and the sink fills whole blocks. The
    default is the paper's for HunyuanVideo, c_t = 1,200 of 3,600 raster positions in 33 frames,
    read as the whole width.

    half_width: tokens on either side, in frames' worth of tokens, as for `Spatial`.
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
    """Gives some heads the `Spatial` mask and the others the `Temporal` mask.

    half_width: tokens on either side in both bands, in frames' worth of tokens.
    sink: all tokens attend to the whole first frame.
    spatial_heads: share of the heads that are spatial, counted from the first; the rest is
        temporal.
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
        """Return bool `[2, n, n]`: the spatial layout, then the temporal one."""
        return torch.stack([self._blocks(grid, block, major) for major in (False, True)])

    def order(self, grid: TokenGrid, block: int) -> Tensor:
        return torch.stack([self._order(grid, major) for major in (False, True)])

    def head_layouts(self, heads: int) -> list[int]:
        spatial = round(self.spatial_heads * heads)
        return [int(head >= spatial) for head in range(heads)]


def _place(grid: TokenGrid, raster: Tensor, token_major: bool) -> Tensor:
    """Return a token's position in the sequence in which the band is drawn."""
    if not token_major:
        return raster
    return raster % grid.per_frame * grid.frames + raster // grid.per_frame


def _blocks_near(place: Tensor, queries: Tensor, limit: int, block: int) -> Tensor:
    """Return the blocks with a place within `limit` of one of the sorted `queries`, bool `[n]`."""
    after = torch.searchsorted(queries, place)
    last = queries.numel() - 1
    right = (queries[after.clamp(max=last)] - place).abs()
    left = (queries[(after - 1).clamp(min=0)] - place).abs()
    near = torch.minimum(left, right) <= limit
    padded = torch.zeros(-(-place.numel() // block) * block, dtype=torch.bool)
    padded[: place.numel()] = near
    return padded.view(-1, block).any(1)
