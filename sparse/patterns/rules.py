"""Rules that turn kept token pairs into kept blocks, for windows and for units of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..grid import TokenGrid

# A column of a block is kept when more than KEPT_ROWS of the block's rows keep it, and touched when
# any does. A block of a frame pair is kept when more than KEPT_COLUMNS of its touched columns are
# kept (Radial Attention, arXiv 2506.19852, released code, `shrinkMaskStrict`).
KEPT_ROWS = 1 / 3
KEPT_COLUMNS = 0.6

CHUNK = 2**23  # elements of a temporary tensor


def mostly_kept(grid: TokenGrid, block: int, windows: Sequence[float], sink: bool) -> Tensor:
    """Return the blocks `[n, n]` that are mostly kept, as Radial Attention's released code does.

    This is the rule that settings call "density". Each frame pair is turned into blocks alone, and
    the pairs are then joined by OR. A pair's token mask lies at its offset within the block grid;
    its last, partial block row and column are dropped. The partial block at the end of the video is
    dense (the code pads the sequence and treats the padding as text), and the diagonal, which the
    rule can miss, is kept.

    windows: the largest raster distance kept between frames d apart, at index d; below 0 for none.
    sink: True keeps the first frame's keys whole.
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
            # A pair's canvas may extend past the sequence by an empty block.
            target = kept[top : top + pair.shape[0], left : left + pair.shape[1]]
            target |= pair[: target.shape[0], : target.shape[1]]
    if grid.video % block:
        kept[-1] = True
        kept[:, -1] = True
    return kept.fill_diagonal_(True)


def _pair_blocks(s: int, block: int, row_offset: int, col_offset: int, window: float) -> Tensor:
    """Return the kept blocks of one frame pair whose tokens start `row_offset` and `col_offset`
    tokens into a block."""
    padded = -(-s // block) * block
    rows, cols = (row_offset + padded) // block, (col_offset + padded) // block
    # The first raster position of each block row.
    first = torch.arange(rows)[:, None] * block - row_offset
    raster = torch.arange(s)[None, :]
    low = torch.maximum(first.clamp(min=0), raster - int(window))
    high = torch.minimum((first + block).clamp(max=s), raster + int(window) + 1)
    counts = torch.zeros(rows, (cols + 1) * block, dtype=torch.int32)  # rows that keep a column
    counts[:, col_offset : col_offset + s] = (high - low).clamp(min=0)
    counts = counts[:, : cols * block].view(rows, cols, block)
    whole = (counts > block * KEPT_ROWS).sum(-1)
    touched = (counts > 0).sum(-1)
    return whole > KEPT_COLUMNS * touched


def touch(grid: TokenGrid, block: int, windows: Sequence[float], sink: bool) -> Tensor:
    """Return the blocks `[n, n]` with any kept token pair; for arguments see `mostly_kept`."""
    s, video = grid.per_frame, grid.video
    # Units are runs of tokens in one block and one frame: only the nearest ends of two matter.
    starts = torch.cat([torch.arange(0, video, s), torch.arange(0, video, block)]).unique()
    offsets = torch.cat([starts, starts.new_tensor([video])])
    frame = starts // s
    low, high = (starts % s).int(), ((offsets[1:] - 1) % s).int()
    limits = torch.tensor(windows).floor().int()

    def kept(rows: slice) -> Tensor:
        gap = torch.maximum(low[None] - high[rows, None], low[rows, None] - high[None])
        near = gap.clamp_(min=0) <= limits[(frame[rows, None] - frame[None]).abs()]
        return near | (frame == 0) if sink else near

    return any_of_units(offsets, block, kept).fill_diagonal_(True)


def any_of_units(offsets: Tensor, block: int, kept: Callable[[slice], Tensor]) -> Tensor:
    """Return the blocks `[n, n]` in which any query unit keeps any key unit.

    A unit is a run of positions that are kept or dropped together; a block may hold several units
    or parts of them.

    offsets: int64 `[units + 1]`, the start of each unit, then the end of the video.
    kept: returns for a slice of query units which key units they keep, bool `[len(slice), units]`.
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
    """Return bool `[rows, len(first)]`, whose column i is `values[:, first[i] : end[i]].any(1)`."""
    if bool((end - first == 1).all()):
        return values[:, first]
    sums = torch.zeros(values.shape[0], values.shape[1] + 1, dtype=torch.int32)
    torch.cumsum(values, 1, dtype=torch.int32, out=sums[:, 1:])
    return sums[:, end] > sums[:, first]
