"""Radial Attention (Li et al., NeurIPS 2025, arXiv 2506.19852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..grid import TokenGrid

# A block of a frame pair is kept when more than DENSE_COLUMNS of its touched columns are dense; a
# column is dense when more than COLUMN_DENSITY of the block's rows keep it (released code,
# `shrinkMaskStrict`).
COLUMN_DENSITY = 1 / 3
DENSE_COLUMNS = 0.6


@dataclass(frozen=True)
class Radial:
    """A token sees fewer neighbours of a frame the further away that frame is.

    At frame distance d a token attends to the raster positions within a window that halves each
    time d doubles; once the window would be thinner than one block it stays one block wide and
    frames are skipped instead. Cost grows as n log n. The window follows the authors' released
    code, whose octaves are powers of two (`bit_length`), which is what the paper's tables were
    computed with; section 3.2, Eq. 4 of the paper is continuous in the frame size.

    decay: scales every window beyond `near` (1 in the paper's tables).
    sink: all tokens attend to the whole first frame (paper, appendix A.1).
    near: frames at most this far apart attend to each other in full.
    rule: how token pairs become blocks; "density" is the released code's rule (see `blocks`).
    """

    decay: float = 1.0
    sink: bool = True
    near: int = 1
    rule: Literal["density"] = "density"

    def __post_init__(self) -> None:
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive (1.0 is the paper's setting).")
        if self.near < 1:
            raise ValueError(f"near={self.near} must be at least 1: a frame and its neighbours.")
        if self.rule != "density":
            raise ValueError(f'rule={self.rule!r} is unknown; "density" is implemented.')

    def window(self, grid: TokenGrid, distance: int, block: int) -> float:
        """Largest raster distance kept between two frames `distance` apart; -1 if none is.

        The released code hard-codes the thresholds at 128 tokens; here they are `block`, and
        neighbouring frames are never skipped, which only matters for frames under 256 tokens.
        """
        if distance <= self.near:
            return grid.per_frame
        octave = 2.0 ** (grid.per_frame.bit_length() - distance.bit_length())
        if octave < block and distance % int(block / octave):
            return -1.0
        return max(octave * self.decay, block)

    def keep(self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128) -> Tensor:
        windows = torch.tensor([self.window(grid, d, block) for d in range(grid.frames)])
        s, video = grid.per_frame, grid.video
        text = (q >= video) | (kv >= video)
        distance = (q // s - kv // s).abs().clamp(max=grid.frames - 1)
        near = (q % s - kv % s).abs() <= windows[distance]
        return text | near | (self.sink & (kv < s))

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Each frame pair is turned into blocks alone, and the pairs are then joined by OR.

        A pair's token mask lies at its offset within the block grid; its last, partial block row
        and column are dropped. Then the partial block at the end of the video is dense (the code
        pads the sequence and treats the padding as text), and so is the diagonal, which the rule
        can miss.
        """
        s, frames, n = grid.per_frame, grid.frames, -(-grid.video // block)
        kept = torch.zeros(n, n, dtype=torch.bool)
        pairs: dict[tuple[int, int, float], Tensor] = {}
        for i in range(frames):
            for j in range(frames):
                window = float(s) if self.sink and j == 0 else self.window(grid, abs(i - j), block)
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
