"""Radial Attention's rule on 3-D blocks of tokens: our own, unpublished as far as we know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import TokenGrid
from .radial import Radial
from .rules import KEPT_COLUMNS, KEPT_ROWS, any_of_units
from .tiles import Tiling, parse_triple


@dataclass(frozen=True)
class Cube(Radial):
    """Applies Radial's token rule to cubes of frames x height x width tokens, not to raster runs.

    The kept tokens are those of `Radial`; only the grouping into blocks differs. A Radial block is
    a strip of one or two rows of one frame. A cube is nearly square and spans several frames, so
    that it holds tokens that look alike.

    Tokens are ordered cube by cube, whole cubes first, then the smaller ones at the far borders.
    `rule` decides from all token pairs of two cubes whether they keep each other: with "density",
    when more than 0.6 of the touched columns are kept by more than a third of the rows; with
    "touch" and "eq4", when any pair is kept. A block keeps another if any of its cubes does, and it
    always keeps itself.

    That a cube spans frames has consequences. Under "density", frames are lost where fewer than
    one in three is kept; a neighbouring frame beyond the edge of a cube is not kept in full; and
    the sink is as deep as a cube. Under "touch" and "eq4", no frame of a cube can be skipped alone,
    so the density stays far above Radial's.

    decay, sink, near, rule: as in `Radial`.
    cube: size of a cube in tokens, such as 4x4x8, or "auto": as many tokens as a block, its powers
        of two dealt to width, height and frames in turn (128 is 4x4x8, 64 is 4x4x4, 32 is 2x4x4).
    """

    cube: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cube != "auto":
            parse_triple("cube", self.cube)

    def _tiling(self, grid: TokenGrid, block: int) -> Tiling:
        if self.cube != "auto":
            return Tiling(grid.without_text(), parse_triple("cube", self.cube))
        power = block.bit_length() - 1
        frames, height, width = (1 << (power + extra) // 3 for extra in (0, 1, 2))
        return Tiling(grid.without_text(), (frames, height, width))

    def note(self, grid: TokenGrid, block: int) -> str | None:
        """Return a sentence for the user if blocks and cubes are not aligned, else None."""
        volume = self._tiling(grid, block).volume
        if volume % block == 0:
            return None
        return (
            f"cube={self.cube} is {volume} tokens, not a multiple of block={block}: blocks that "
            "hold parts of several cubes keep what any of them keeps."
        )

    def order(self, grid: TokenGrid, block: int) -> Tensor:
        return self._tiling(grid, block).order

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        tiling = self._tiling(grid, block)
        t, y, x = tiling.coordinates
        cells = tiling.counts[1] * tiling.counts[2]
        cell = y * tiling.counts[2] + x
        of_slabs, matrices = self._slabs(tiling, block)

        def kept(rows: slice) -> Tensor:
            index = of_slabs[t[rows]][:, t] * cells**2
            index += cell[rows, None] * cells
            index += cell
            return matrices.flatten()[index]

        return any_of_units(tiling.offsets, block, kept).fill_diagonal_(True)

    def _slabs(self, tiling: Tiling, block: int) -> tuple[Tensor, Tensor]:
        """Return which cubes keep each other, factored by slab and by cell.

        A slab is a run of frames that a cube spans, a cell the part of a frame that it covers. The
        result is an int64 matrix over pairs of slabs, and the matrices of cells that it indexes,
        bool `[different, cells, cells]`. A pair of slabs matters only through the windows between
        its frames; there are few of them, so most pairs share a matrix.
        """
        grid, depth = tiling.grid, tiling.size[0]
        windows = self._frame_pair_windows(grid, block)
        counts = {w: _near(tiling, w) for w in windows.unique().tolist() if w >= 0}
        columns: dict[
            tuple[int, ...], tuple[Tensor, Tensor]
        ] = {}  # keyed by the windows of the query frames
        different: dict[tuple[tuple[int, ...], ...], int] = {}
        matrices, of_slabs = [], []
        for query in windows.split(depth):
            for pair in query.split(depth, dim=1):
                key = tuple(sorted(tuple(sorted(column)) for column in pair.T.tolist()))
                if key not in different:
                    for column in set(key) - columns.keys():
                        columns[column] = _columns(tiling, column, counts)
                    kept, touched = (sum(columns[c][kind] for c in key) for kind in (0, 1))
                    mostly_kept = self.rule == "density"
                    matrices.append(kept > KEPT_COLUMNS * touched if mostly_kept else touched > 0)
                    different[key] = len(different)
                of_slabs.append(different[key])
        slabs = tiling.counts[0]
        return torch.tensor(of_slabs).view(slabs, slabs), torch.stack(matrices)

    def _frame_pair_windows(self, grid: TokenGrid, block: int) -> Tensor:
        """Return the window of each frame pair, int64 `[frames, frames]`; -1 for none."""
        by_distance = torch.tensor(self.windows(grid, block)).floor().long()
        index = torch.arange(grid.frames)
        windows = by_distance[(index[:, None] - index[None]).abs()]
        if self.sink:
            windows[:, 0] = grid.per_frame
        return windows


def _near(tiling: Tiling, window: int) -> Tensor:
    """Count the tokens of each cell within `window` of each token: int32 `[cells, per frame]`."""
    (_, height, width), (_, high, wide) = tiling.sides, tiling.size
    token = torch.arange(height * width, dtype=torch.int32)
    left = torch.arange(0, width, wide, dtype=torch.int32)
    right = (left + wide).clamp(max=width)
    counts = torch.zeros(tiling.counts[1], left.numel(), token.numel(), dtype=torch.int32)
    for y in range(height):
        low = torch.maximum(y * width + left[:, None], token - window)
        end = torch.minimum(y * width + right[:, None], token + window + 1)
        counts[y // high] += (end - low).clamp_(min=0)
    return counts.flatten(0, 1)


def _columns(
    tiling: Tiling, windows: tuple[int, ...], counts: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Count the kept and the touched columns of one frame's keys: int32 `[cells, cells]` each.

    windows: for each query frame, the window in which it sees the key frame; -1 for not at all.
    """
    (_, height, width), (_, high, wide) = tiling.sides, tiling.size
    _, down, across = tiling.counts
    token = torch.arange(height * width)
    of_token = token // width // high * across + token % width // wide
    rows = torch.bincount(of_token)[:, None] * len(windows)
    near = torch.zeros(down * across, token.numel(), dtype=torch.int32)
    for window in windows:
        if window >= 0:
            near += counts[window]

    def per_cell(columns: Tensor) -> Tensor:
        sums = torch.zeros(down * across, down * across, dtype=torch.int32)
        return sums.index_add_(1, of_token, columns.int())

    return per_cell(near > rows * KEPT_ROWS), per_cell(near > 0)
