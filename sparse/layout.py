"""Block layouts: the lists of blocks of the attention matrix that the kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.block_sparse.op import BLOCKS
from .grid import TokenGrid
from .patterns import SparsePattern


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Holds the kept blocks of one or several `rows` x `rows` block matrices, as CSR both ways.

    All tensors are int32. Row r of layout l keeps the key blocks
    `row_indices[row_indptr[l, r] : row_indptr[l, r + 1]]`, ascending; column c is attended by the
    query blocks `col_indices[col_indptr[l, c] : col_indptr[l, c + 1]]`. Every token pair of a kept
    block is attended: the layout, not the pattern, defines the result.

    order: for each position of a layout, up to the end of the last block, the index of the token
        that stands there; text is not moved. The first S entries of a row permute S tokens. None
        when every layout takes tokens in raster order.
    inverse: the position of each token, the inverse of `order`.
    """

    row_indptr: Tensor  # [layouts, rows + 1]
    row_indices: Tensor  # [kept blocks]
    col_indptr: Tensor  # [layouts, rows + 1]
    col_indices: Tensor  # [kept blocks]
    block: int
    order: Tensor | None = None  # [layouts, rows * block]
    inverse: Tensor | None = None  # [layouts, rows * block]

    @classmethod
    def from_dense(cls, kept: Tensor, block: int, order: Tensor | None = None) -> BlockLayout:
        """Build lists from a bool tensor `[rows, rows]` or `[layouts, rows, rows]`.

        order: `[layouts, n]`, n at most rows * block; tokens past n stay where they are.

        Raises:
            ValueError: if a row of `order` is not a permutation.
        """
        if kept.dim() == 2:
            kept = kept[None]
        lists = *_csr(kept), *_csr(kept.transpose(1, 2))
        if order is None or torch.equal(order, torch.arange(order.shape[1]).expand_as(order)):
            return cls(*lists, block)
        order = torch.cat([order, _positions(order.shape[1], kept.shape[1] * block, order)], 1)
        inverse = order.argsort(1)
        if not torch.equal(order.gather(1, inverse), _positions(0, order.shape[1], order)):
            raise ValueError("a row of order is not a permutation: a token is missing.")
        return cls(*lists, block, order.int(), inverse.int())

    @property
    def layouts(self) -> int:
        """The number of layouts."""
        return self.row_indptr.shape[0]

    @property
    def rows(self) -> int:
        """The number of query blocks, which is also that of key blocks."""
        return self.row_indptr.shape[1] - 1

    @property
    def density(self) -> float:
        """The kept share of all blocks, the padded tail included: the figure that papers print.

        It is the mean over layouts.
        """
        return self.row_indices.numel() / (self.layouts * self.rows**2)

    def token_densities(self, tokens: int) -> list[float]:
        """Return each layout's kept share of the real token pairs of a sequence of `tokens`.

        The length is an argument because one layout serves every text length that ends in the same
        block. The shares follow from the lists' lengths alone, which is cheap enough for every
        training step.

        Raises:
            ValueError: if `tokens` do not end in the last block.
        """
        short = self.block - _tail(tokens, self.rows, self.block)  # padding in the last block
        first, last_row, end = (self.row_indptr[:, i].long() for i in (0, -2, -1))
        last_column = (self.col_indptr[:, -1] - self.col_indptr[:, -2]).long()
        # True where the last row, whose blocks ascend, keeps the last column.
        corner = (self.row_indices[end - 1] == self.rows - 1) & (end > last_row)
        pairs = (end - first) * self.block**2 + corner * short**2
        pairs -= (end - last_row + last_column) * self.block * short
        return [count / tokens**2 for count in pairs.tolist()]

    def token_density(self, tokens: int, head_layouts: Sequence[int] | None = None) -> float:
        """Return the mean kept share of the real token pairs of a sequence of `tokens`.

        head_layouts: the layout of each head, to average over heads; None averages over layouts.

        Raises:
            ValueError: if `tokens` do not end in the last block.
        """
        shares = self.token_densities(tokens)
        chosen = range(self.layouts) if head_layouts is None else head_layouts
        return sum(shares[layout] for layout in chosen) / len(chosen)

    def to_dense(self) -> Tensor:
        """Return the kept blocks as bool `[layouts, rows, rows]`, on the CPU."""
        indptr, indices = self.row_indptr.cpu().long(), self.row_indices.cpu().long()
        layouts, rows = self.layouts, self.rows
        counts = indptr.diff(dim=1).reshape(-1)
        kept = torch.zeros(layouts * rows, rows, dtype=torch.bool)
        kept[torch.repeat_interleave(torch.arange(layouts * rows), counts), indices] = True
        return kept.view(layouts, rows, rows)

    def to(self, device: torch.device | str) -> BlockLayout:
        """Return the layout with all of its tensors on `device`."""
        lists = ("row_indptr", "row_indices", "col_indptr", "col_indices", "order", "inverse")
        moved = {name: getattr(self, name) for name in lists}
        return replace(self, **{k: v if v is None else v.to(device) for k, v in moved.items()})


def token_densities(kept: Tensor, block: int, tokens: int) -> list[float]:
    """Return each layout's share of the token pairs of `tokens` that lie in kept blocks.

    kept: bool `[layouts, rows, rows]`.

    Raises:
        ValueError: if `tokens` do not end in the last block.
    """
    tail = _tail(tokens, kept.shape[1], block)
    keys = kept.sum(-1) * block - kept[..., -1].long() * (block - tail)  # of each block row
    pairs = keys.sum(-1) * block - keys[:, -1] * (block - tail)
    return [count / tokens**2 for count in pairs.tolist()]


def _tail(tokens: int, rows: int, block: int) -> int:
    """Return how many of `tokens` are in the last of `rows` blocks."""
    tail = tokens - (rows - 1) * block
    if not 0 < tail <= block:
        raise ValueError(f"{tokens} tokens do not end in the last of {rows} blocks.")
    return tail


def _positions(start: int, end: int, like: Tensor) -> Tensor:
    return torch.arange(start, end, dtype=like.dtype).expand(len(like), -1)


def _csr(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Turn kept `[layouts, rows, columns]` into indptr `[layouts, rows + 1]` and indices."""
    layouts, rows, _ = kept.shape
    counts = kept.sum(-1).reshape(-1)
    ends = counts.cumsum(0).view(layouts, rows)
    starts = ends[:, :1] - counts.view(layouts, rows)[:, :1]
    # One layout at a time, because `nonzero` takes 16 bytes per kept block.
    indices = torch.cat([matrix.nonzero()[:, 1].int() for matrix in kept])
    return torch.cat([starts, ends], 1).int(), indices


def build_layout(pattern: SparsePattern, grid: TokenGrid, block: int = 128) -> BlockLayout:
    """Return the layout of the blocks that `pattern` keeps on `grid`, on the CPU.

    The rows and columns of text blocks are dense. Text begins where the video ends, often inside a
    block, and that block's row and column are dense too. Layouts are cached: text lengths that end
    in the same block share one.

    Raises:
        ValueError: if the kernels do not support `block`.
    """
    if block not in BLOCKS:
        raise ValueError(f"block={block} must be one of {BLOCKS}.")
    return _build(pattern, grid.without_text(), block, -(-len(grid) // block), grid.text > 0)


@lru_cache(maxsize=32)
def _build(
    pattern: SparsePattern, grid: TokenGrid, block: int, rows: int, text: bool
) -> BlockLayout:
    with torch.inference_mode(False):  # a backward may later save the cached lists
        kept, order = _kept(pattern, grid, block, rows, text), pattern.order(grid, block)
        if order is None:
            return BlockLayout.from_dense(kept, block)
        layouts = max(len(kept), len(order) if order.dim() == 2 else 1)
        kept, order = kept.expand(layouts, -1, -1), order.expand(layouts, -1)
        return BlockLayout.from_dense(kept, block, order)


def kept_blocks(pattern: SparsePattern, grid: TokenGrid, block: int) -> Tensor:
    """Return the blocks that `build_layout` would list, as bool `[layouts, rows, rows]`, uncached.

    One matrix may stand for several layouts that differ only in their order.
    """
    return _kept(pattern, grid.without_text(), block, -(-len(grid) // block), grid.text > 0)


def _kept(pattern: SparsePattern, grid: TokenGrid, block: int, rows: int, text: bool) -> Tensor:
    """Return the pattern's blocks of video tokens, extended by dense text rows and columns."""
    video = pattern.blocks(grid, block)
    if video.dim() == 2:
        video = video[None]
    if rows == video.shape[1] and not text:
        return video
    kept = torch.ones(len(video), rows, rows, dtype=torch.bool)
    kept[:, : video.shape[1], : video.shape[2]] = video
    first_text = grid.video // block
    kept[:, first_text:] = True
    kept[:, :, first_text:] = True
    return kept
