"""Which blocks of the attention matrix are computed: what the kernels walk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.block_sparse.op import BLOCKS
from .grid import TokenGrid
from .patterns import SparsePattern


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept blocks of one or several `rows` x `rows` block matrices, as CSR by row and by column.

    All tensors are int32. Row r of layout l keeps the key blocks
    `row_indices[row_indptr[l, r] : row_indptr[l, r + 1]]`, ascending; column c is attended by the
    query blocks `col_indices[col_indptr[l, c] : col_indptr[l, c + 1]]`. Every token pair of a kept
    block is attended: the layout, not the pattern, defines the result.
    """

    row_indptr: Tensor  # [layouts, rows + 1]
    row_indices: Tensor  # [kept blocks]
    col_indptr: Tensor  # [layouts, rows + 1]
    col_indices: Tensor  # [kept blocks]
    block: int

    @classmethod
    def from_dense(cls, kept: Tensor, block: int) -> BlockLayout:
        """From a bool tensor `[rows, rows]` or `[layouts, rows, rows]`."""
        if kept.dim() == 2:
            kept = kept[None]
        row_indptr, row_indices = _csr(kept)
        col_indptr, col_indices = _csr(kept.transpose(1, 2))
        return cls(row_indptr, row_indices, col_indptr, col_indices, block)

    @property
    def rows(self) -> int:
        """Query blocks, and as many key blocks."""
        return self.row_indptr.shape[1] - 1

    @property
    def density(self) -> float:
        """Kept share of all blocks, the padded tail included: the figure that papers print."""
        return self.row_indices.numel() / (self.row_indptr.shape[0] * self.rows**2)

    def token_density(self, tokens: int) -> float:
        """Kept share of the real token pairs of a sequence of `tokens`: what is computed.

        An argument, because one layout serves every text length that ends in the same block.
        """
        if not 0 <= self.rows * self.block - tokens < self.block:
            raise ValueError(f"{tokens} tokens do not end in the last of {self.rows} blocks.")
        sizes = torch.full((self.rows,), self.block, dtype=torch.float64)
        sizes[-1] = tokens - (self.rows - 1) * self.block
        dense = self.to_dense().double()
        return (sizes @ dense @ sizes / tokens**2).mean().item()

    def to_dense(self) -> Tensor:
        """Kept blocks as bool `[layouts, rows, rows]`, on the CPU."""
        indptr, indices = self.row_indptr.cpu().long(), self.row_indices.cpu().long()
        layouts, rows = indptr.shape[0], self.rows
        counts = indptr.diff(dim=1).reshape(-1)
        kept = torch.zeros(layouts * rows, rows, dtype=torch.bool)
        kept[torch.repeat_interleave(torch.arange(layouts * rows), counts), indices] = True
        return kept.view(layouts, rows, rows)

    def to(self, device: torch.device | str) -> BlockLayout:
        lists = ("row_indptr", "row_indices", "col_indptr", "col_indices")
        return replace(self, **{name: getattr(self, name).to(device) for name in lists})


def _csr(kept: Tensor) -> tuple[Tensor, Tensor]:
    layouts, rows, _ = kept.shape
    counts = kept.sum(-1).reshape(-1)
    ends = counts.cumsum(0).view(layouts, rows)
    starts = ends[:, :1] - counts.view(layouts, rows)[:, :1]
    indices = kept.reshape(layouts * rows, -1).nonzero()[:, 1]
    return torch.cat([starts, ends], 1).int(), indices.int()


def build_layout(pattern: SparsePattern, grid: TokenGrid, block: int = 128) -> BlockLayout:
    """The blocks that `pattern` keeps on `grid`, on the CPU; text rows and columns are dense.

    Text begins where the video ends, often inside a block: that block's row and column are dense
    too. Cached: text lengths that end in the same block share one layout.
    """
    if block not in BLOCKS:
        raise ValueError(f"block={block} must be one of {BLOCKS}.")
    return _build(pattern, grid.without_text(), block, -(-len(grid) // block), grid.text > 0)


@lru_cache(maxsize=32)
def _build(
    pattern: SparsePattern, grid: TokenGrid, block: int, rows: int, text: bool
) -> BlockLayout:
    with torch.inference_mode(False):  # the cached lists may later be saved for a backward
        return BlockLayout.from_dense(_kept(pattern, grid, block, rows, text), block)


def _kept(pattern: SparsePattern, grid: TokenGrid, block: int, rows: int, text: bool) -> Tensor:
    video = pattern.blocks(grid, block)
    kept = torch.ones(rows, rows, dtype=torch.bool)
    kept[: video.shape[0], : video.shape[1]] = video
    if text:
        first_text = grid.video // block
        kept[first_text:] = True
        kept[:, first_text:] = True
    return kept
