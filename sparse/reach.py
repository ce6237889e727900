"""Reach: the number of layers until every video token has reached every other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import TokenGrid
from .layout import build_layout
from .patterns import SparsePattern

WORD = 64
CHUNK = 1 << 14  # tokens handled together
MOST_CHECKS = 4096  # most sets of blocks that are compared with all tokens after one layer


def layers_to_full_reach(
    pattern: SparsePattern, grid: TokenGrid, block: int = 128, heads: int | None = None
) -> int | None:
    """Return how many layers it takes until each video token can depend on every other.

    The result is None if that never happens. Only the executed blocks of the pattern count: neither
    text, which would connect everything in two layers, nor dense layers. A layer unites the layouts
    that the heads use, since its output projection mixes heads, and a token keeps what it has
    (residual connections).

    The result is exact where all layouts share one order. With several orders, tokens and not
    blocks carry information from one order to the next. The result is then exact too, unless after
    some layer more than MOST_CHECKS different sets of reached blocks would have to be compared
    with all tokens: that layer counts as not full, so the result is an upper bound. Memory is that
    of a few bit matrices of blocks by blocks.

    heads: number of heads, to count only the layouts that some head uses; None counts all.
    """
    orders = _orders(pattern, grid, block, heads)
    crossing = _crossing(orders, grid.video, block)
    # reached[b]: the blocks that the tokens of b, taken together, have reached in full; one bit for
    # each block of each order. `seen` is the same before tokens carry it to other orders.
    n = -(-grid.video // block)
    reached = _pack(torch.eye(len(orders) * n, dtype=torch.bool))
    seen = torch.zeros_like(reached)
    layers = 0
    while True:
        parts = [
            order.runs.union(part) for order, part in zip(orders, reached.split(n), strict=True)
        ]
        grown = seen | torch.cat(parts)
        if torch.equal(grown, seen):
            return None
        seen, layers = grown, layers + 1
        if _is_full(seen, orders, n):
            return layers
        reached = seen if len(orders) == 1 else _carry(crossing, seen, n)


class _Runs:
    """Stores the rows of a bool matrix as runs of kept columns, to unite bit rows over them fast.

    The union over a run is that of two overlapping power-of-two ranges, so its cost does not depend
    on the run's length.
    """

    def __init__(self, kept: Tensor) -> None:
        rows, self.columns = kept.shape
        edge = torch.zeros(rows, 1, dtype=torch.bool)
        first = (kept & ~torch.cat([edge, kept[:, :-1]], 1)).nonzero()
        last = (kept & ~torch.cat([kept[:, 1:], edge], 1)).nonzero()
        counts = torch.bincount(first[:, 0], minlength=rows)
        offsets = counts.cumsum(0) - counts
        self.by_count = counts.argsort(descending=True, stable=True)
        self.active = [int((counts > i).sum()) for i in range(int(counts.max()))]
        self.offsets = offsets[self.by_count]
        self.start, length = first[:, 1], last[:, 1] - first[:, 1] + 1
        self.level = torch.tensor([int(x).bit_length() - 1 for x in range(self.columns + 1)])[
            length
        ]
        self.second = last[:, 1] + 1 - (1 << self.level)

    def union(self, bits: Tensor) -> Tensor:
        """Unite for each row the bits `[columns, words]` of its kept columns: `[rows, words]`."""
        table = [bits]  # table[k][i]: the union of bits[i : i + 2 ** k], cut off at the end
        for k in range(int(self.level.max()) if len(self.level) else 0):
            wider = table[-1].clone()
            wider[: -(1 << k)] |= table[-1][1 << k :]
            table.append(wider)
        ranges = torch.stack(table).flatten(0, 1)
        first, second = (self.level * self.columns + x for x in (self.start, self.second))
        result = bits.new_zeros(len(self.offsets), bits.shape[1])
        for i, count in enumerate(self.active):
            run = self.offsets[:count] + i
            result[:count] |= ranges[first[run]] | ranges[second[run]]
        return torch.empty_like(result).index_copy_(0, self.by_count, result)


@dataclass(frozen=True, eq=False)
class _Order:
    """Holds one token order and the blocks that any head keeps under it."""

    block_of: Tensor  # [video] the block of each token
    runs: _Runs


def _orders(pattern: SparsePattern, grid: TokenGrid, block: int, heads: int | None) -> list[_Order]:
    """Return the different token orders, uniting the blocks of layouts that share one."""
    layout = build_layout(pattern, grid.without_text(), block)
    used = range(layout.layouts) if heads is None else sorted(set(pattern.head_layouts(heads)))
    plain = torch.arange(grid.video, dtype=torch.int32)
    united: list[tuple[Tensor, Tensor]] = []
    dense = layout.to_dense()
    for index in used:
        position = plain if layout.inverse is None else layout.inverse[index, : grid.video]
        for other, kept in united:
            if torch.equal(other, position):
                kept |= dense[index]
                break
        else:
            united.append((position, dense[index].clone()))
    return [_Order(position.long() // block, _Runs(kept)) for position, kept in united]


def _crossing(orders: list[_Order], video: int, block: int) -> dict[tuple[int, int], _Runs]:
    """Return, by pair of orders, which blocks of the one share a token with which of the other."""
    n = -(-video // block)
    crossing = {}
    for a, one in enumerate(orders):
        for b, other in enumerate(orders):
            if a != b:
                shared = torch.zeros(n, n, dtype=torch.bool)
                shared[one.block_of, other.block_of] = True
                crossing[a, b] = _Runs(shared)
    return crossing


def _carry(crossing: dict[tuple[int, int], _Runs], seen: Tensor, n: int) -> Tensor:
    """Add to what each block has seen what its tokens have seen in their blocks of other orders."""
    parts = seen.split(n)
    result = [part.clone() for part in parts]
    for (a, b), runs in crossing.items():
        result[a] |= runs.union(parts[b])
    return torch.cat(result)


def _is_full(seen: Tensor, orders: list[_Order], n: int) -> bool:
    """Return whether every token has seen every token, under one order or several together."""
    wholes = [_pack(_span(len(orders) * n, a * n, n))[0] for a in range(len(orders))]
    parts = seen.split(n)
    if len(orders) == 1:
        return bool((parts[0] == wholes[0]).all())
    open_sets: list[Tensor] = []
    for start in range(0, len(orders[0].block_of), CHUNK):
        blocks = [order.block_of[start : start + CHUNK] for order in orders]
        token = parts[0][blocks[0]]
        for part, index in zip(parts[1:], blocks[1:], strict=True):
            token = token | part[index]
        full = torch.stack([((token & whole) == whole).all(1) for whole in wholes]).any(0)
        if not full.all():
            open_sets.append(token[~full].unique(dim=0))
            if not _covers(open_sets[-1][:1], orders, n):  # most calls end here
                return False
    if not open_sets:
        return True
    sets = torch.cat(open_sets).unique(dim=0)
    return len(sets) <= MOST_CHECKS and _covers(sets, orders, n)


def _covers(sets: Tensor, orders: list[_Order], n: int) -> bool:
    """Return whether each set of blocks holds every token, under one order or another."""
    for row in sets:
        blocks = _unpack(row, len(orders) * n).split(n)
        held = torch.zeros_like(orders[0].block_of, dtype=torch.bool)
        for order, part in zip(orders, blocks, strict=True):
            held |= part[order.block_of]
        if not held.all():
            return False
    return True


def _span(size: int, start: int, length: int) -> Tensor:
    row = torch.zeros(1, size, dtype=torch.bool)
    row[:, start : start + length] = True
    return row


def _pack(rows: Tensor) -> Tensor:
    """Pack bool `[rows, n]` into the bits of int64 `[rows, ceil(n / 64)]`."""
    count, n = rows.shape
    padded = torch.nn.functional.pad(rows.to(torch.uint8), (0, -n % WORD)).view(count, -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8).contiguous().view(torch.int64)


def _unpack(row: Tensor, n: int) -> Tensor:
    """Unpack the first n bits of a packed row to bool `[n]`."""
    bits = row.contiguous().view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).flatten()[:n].bool()
