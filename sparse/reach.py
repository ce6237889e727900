"""How far information travels: layers until every video token has reached every other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import TokenGrid
from .layout import build_layout
from .patterns import SparsePattern

WORD = 64
CHUNK = 1 << 14  # tokens handled together
MOST_CHECKS = 4096  # a level: sets of blocks that are compared with all tokens


def layers_to_full_reach(
    pattern: SparsePattern, grid: TokenGrid, block: int = 128, heads: int | None = None
) -> int | None:
    """Layers until each video token can depend on every other, None if it never does.

    Through the executed blocks of the pattern alone: without text, which would join all in two
    layers, and without dense layers. A layer unites the layouts that the heads follow (`heads`
    None: all of them), since its output projection mixes heads; a token keeps what it has.

    Exact where all layouts share one order. With several orders tokens, not blocks, carry
    information from one to the next: also exact, until a level where more than MOST_CHECKS
    different sets of reached blocks would have to be compared with all tokens. Such a level counts
    as not full, so the result is then an upper bound. Memory is that of some bit matrices of
    blocks by blocks.
    """
    orders = _orders(pattern, grid, block, heads)
    crossing = _crossing(orders, grid.video, block)
    # reached[b]: the blocks that tokens of b have reached whole; one bit for each block of each
    # order. `seen` is the same after a pattern's step, before tokens carry it to other orders.
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
    """The rows of a bool matrix as runs of kept columns, to unite bit rows over them quickly.

    A union over a run is that of two overlapping power-of-two ranges, so its cost does not depend
    on its length.
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
        """`[columns, words]` -> `[rows, words]`: the union of the columns that each row keeps."""
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
    """One token order, and the blocks that any head keeps under it."""

    block_of: Tensor  # [video] the block that each token stands in
    runs: _Runs


def _orders(pattern: SparsePattern, grid: TokenGrid, block: int, heads: int | None) -> list[_Order]:
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
    """By pair of orders, which blocks of the one share a token with which of the other."""
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
    """What the tokens of each block have seen, whichever order they saw it in."""
    parts = seen.split(n)
    result = [part.clone() for part in parts]
    for (a, b), runs in crossing.items():
        result[a] |= runs.union(parts[b])
    return torch.cat(result)


def _is_full(seen: Tensor, orders: list[_Order], n: int) -> bool:
    """Whether every token has seen every token, under one of the orders that it stands in."""
    wholes = [_pack(_span(len(orders) * n, a * n, n))[0] for a in range(len(orders))]
    parts = seen.split(n)
    if len(orders) == 1:
        return bool((parts[0] == wholes[0]).all())
    open_sets: list[Tensor] = []
    for start in range(0, len(orders[0].block_of), CHUNK):
        of = [order.block_of[start : start + CHUNK] for order in orders]
        token = parts[0][of[0]]
        for part, index in zip(parts[1:], of[1:], strict=True):
            token = token | part[index]
        full = torch.stack([((token & whole) == whole).all(1) for whole in wholes]).any(0)
        if not full.all():
            open_sets.append(token[~full].unique(dim=0))
            if not _covers(open_sets[-1][:1], orders, n):  # most levels end here
                return False
    if not open_sets:
        return True
    sets = torch.cat(open_sets).unique(dim=0)
    return len(sets) <= MOST_CHECKS and _covers(sets, orders, n)


def _covers(sets: Tensor, orders: list[_Order], n: int) -> bool:
    """Whether each set of blocks holds, under one order or another, every token."""
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
    """bool `[rows, n]` -> int64 `[rows, ceil(n / 64)]`, a bit for each."""
    count, n = rows.shape
    padded = torch.nn.functional.pad(rows.to(torch.uint8), (0, -n % WORD)).view(count, -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8).contiguous().view(torch.int64)


def _unpack(row: Tensor, n: int) -> Tensor:
    """The first n bits of a packed row as bool `[n]`."""
    bits = row.contiguous().view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).flatten()[:n].bool()
