"""Rules that turn token pairs into blocks, for patterns made of windows or of units of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..grid import TokenGrid

# A block of a frame pair is kept when more than DENSE_COLUMNS of its touched columns are dense; a
# column is dense when more than COLUMN_DENSITY of the block's rows keep it (Radial Attention,
# arXiv 2506.19852, released code, `shrinkMaskStrict`).
COLUMN_DENSITY = 1 / 3
DENSE_COLUMNS = 0.6

CHUNK = 2**23  # elements of a temporary tensor


def density(grid: TokenGrid, block: int, windows: Sequence[float], sink: bool) -> Tensor:
    """Blocks `[n, n]` that are mostly kept, as Radial Attention's released code decides it.

    Each frame pair is turned into blocks alone, and the pairs are then joined by OR. A pair's token
    mask lies at its offset within the block grid; its last, partial block row and column are
    dropped. Then the partial block at the end of the video is dense (the code pads the sequence and
    treats the padding as text), and so is the diagonal, which the rule can miss.

    windows: largest raster distance kept between frames `d` apart, at index d; below 0 for none.
    sink: the first frame's keys are kept whole.
    """
    s, frames, n = grid.per_frame, grid.frames, -(-grid.video // block)
    kept = torch.zeros(n, n, dtype=torch.bool)
    pairs: dict[tuple[int, int, float], Tensor] = {}
    for i in range(frames):
        for j in range(frames):
            window = float(s) if sink and j == 0 else windows[abs(i - j)]
            if window < 0:
                continue
            row, col = i * s, j * s
            key = (row % block, col % block, window)
            if key not in pairs:
                pairs[key] = _pair_blocks(s, block, *key)
            pair = pairs[key]
            top, left = row // block, col // block
            # A pair's canvas may reach past the sequence by a block that holds none of it.
            target = kept[top : top + pair.shape[0], left : left + pair.shape[1]]
            target |= pair[: target.shape[0], : target.shape[1]]
    if grid.video % block:
        kept[-1] = True
        kept[:, -1] = True
    return kept.fill_diagonal_(True)


def _pair_blocks(s: int, block: int, row_offset: int, col_offset: int, window: float) -> Tensor:
    """Blocks kept of one frame pair whose tokens start `row_offset`, `col_offset` into a block."""
    padded = -(-s // block) * block
    rows, cols = (row_offset + padded) // block, (col_offset + padded) // block
    first = (
        torch.arange(rows)[:, None] * block - row_offset
    )  # the block row's first raster position
    raster = torch.arange(s)[None, :]
    low = torch.maximum(first.clamp(min=0), raster - int(window))
    high = torch.minimum((first + block).clamp(max=s), raster + int(window) + 1)
    counts = torch.zeros(rows, (cols + 1) * block, dtype=torch.int32)  # rows that keep a column
    counts[:, col_offset : col_offset + s] = (high - low).clamp(min=0)
    counts = counts[:, : cols * block].view(rows, cols, block)
    dense = (counts > block * COLUMN_DENSITY).sum(-1)
    touched = (counts > 0).sum(-1)
    return dense > DENSE_COLUMNS * touched


def touch(grid: TokenGrid, block: int, windows: Sequence[float], sink: bool) -> Tensor:
    """Blocks `[n, n]` any of whose token pairs is kept; `windows` and `sink` as in `density`."""
    s, video = grid.per_frame, grid.video
    # Runs of tokens that share a block and a frame: of two such, only the nearest ends matter.
    starts = torch.cat([torch.arange(0, video, s), torch.arange(0, video, block)]).unique()
    offsets = torch.cat([starts, starts.new_tensor([video])])
    frame = starts // s
    low, high = (starts % s).int(), ((offsets[1:] - 1) % s).int()
    reach = torch.tensor(windows).floor().int()

    def kept(rows: slice) -> Tensor:
        gap = torch.maximum(low[None] - high[rows, None], low[rows, None] - high[None])
        near = gap.clamp_(min=0) <= reach[(frame[rows, None] - frame[None]).abs()]
        return near | (frame == 0) if sink else near

    return any_of_units(offsets, block, kept).fill_diagonal_(True)


def any_of_units(offsets: Tensor, block: int, kept: Callable[[slice], Tensor]) -> Tensor:
    """Blocks `[n, n]` kept because they hold tokens of two units one of which keeps the other.

    A unit is a run of positions that are kept or dropped together; a block may hold several, or
    parts of them.

    offsets: int64 `[units + 1]`, where each unit begins, then where the video ends.
    kept: for a slice of query units, which key units they keep: bool `[len(slice), units]`.
    """
    units, video = offsets.numel() - 1, int(offsets[-1])
    starts = torch.arange(0, video, block)
    first = torch.searchsorted(offsets, starts, right=True) - 1
    end = torch.searchsorted(offsets, (starts + block).clamp(max=video))
    n, result = starts.numel(), []
    begins, ends = first.tolist(), end.tolist()
    row = 0
    while row < n:
        after = row + 1
        while after < n and (ends[after] - begins[row]) * units <= CHUNK:
            after += 1
        pairs = kept(slice(begins[row], ends[after - 1]))
        pairs = _any_of_runs(pairs, first, end)
        own = slice(row, after)
        result.append(_any_of_runs(pairs.T, first[own] - begins[row], end[own] - begins[row]).T)
        row = after
    return torch.cat(result)


def _any_of_runs(values: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """`values[:, first[i] : end[i]].any(1)` at column i: bool `[rows, len(first)]`."""
    if bool((end - first == 1).all()):
        return values[:, first]
    sums = torch.zeros(values.shape[0], values.shape[1] + 1, dtype=torch.int32)
    torch.cumsum(values, 1, dtype=torch.int32, out=sums[:, 1:])
    return sums[:, end] > sums[:, first]
