"""Device-side pieces shared by the forward and backward kernels, and what a launch needs around it.

A kernel sees one head of one sample as a [tokens, D] matrix with a row stride. `open_rows` makes it
readable, either as a tensor descriptor (Hopper's bulk copy engine, which also zero-fills the rows
past the end and drops stores to them) or as a bare pointer, and `load_rows` and `store_rows` move
tiles of it. All offsets are 64-bit: tokens x heads x head_dim passes 2**31 elements in real use.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def own_start(BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The first token of this program's tile: tiles in order, but the last four blocks come first.

    Text is dense and comes last in a sequence: its rows and columns take several times as long as
    any other, and started last they would run on alone. (Sink frames, at the front, already lead.)
    """
    tiles = tl.num_programs(0)
    last = tl.minimum(4 * (BLOCK // TILE), tiles)
    return (tl.program_id(0) + tiles - last) % tiles * TILE


@triton.jit
def open_rows(base, end, stride, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Rows [0, end) of a [tokens, D] matrix that starts at `base`, to be read `ROWS` at a time."""
    if TMA:
        # A descriptor of no rows is invalid; where `end` is 0 nothing is ever loaded through it.
        return tl.make_tensor_descriptor(base, [tl.maximum(end, 1), D], [stride, 1], [ROWS, D])
    else:
        return base


@triton.jit
def _pointers(base, start, stride, ROWS: tl.constexpr, D: tl.constexpr):
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    return base + rows[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(
    rows, start, end, stride,
    ROWS: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, D] at row `start`, zero past `end`; `WHOLE` promises that none of it is."""
    if TMA:
        return rows.load([start, 0])
    elif WHOLE:
        return tl.load(_pointers(rows, start, stride, ROWS, D))
    else:
        inside = start + tl.arange(0, ROWS) < end
        return tl.load(_pointers(rows, start, stride, ROWS, D), mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(
    rows, tile, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr
):
    """Write the tile [ROWS, D] at row `start`, less the rows past `end`."""
    if TMA:
        rows.store([start, 0], tile)
    else:
        inside = start + tl.arange(0, ROWS) < end
        tl.store(_pointers(rows, start, stride, ROWS, D), tile, mask=inside[:, None])


@triton.jit
def open_sums(base, end, ROWS: tl.constexpr, TMA: tl.constexpr):
    """`end` fp32 values, one a query, to be read `ROWS` at a time without a bound.

    Through a descriptor where there is one: of a specialized loop's loads, those by pointer are the
    ones that Triton cannot give to the copying warps.
    """
    if TMA:
        return tl.make_tensor_descriptor(base, [end], [1], [ROWS])
    else:
        return base


@triton.jit
def load_sums(sums, start, ROWS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return sums.load([start])
    else:
        return tl.load(sums + start + tl.arange(0, ROWS))


@triton.jit
def keys_end(valid, batch, S):
    """One past the last key that counts in this sample."""
    if valid is None:
        return S
    else:
        return tl.minimum(tl.load(valid + batch), S)


@triton.jit
def visible_tiles(indices, first, stop, end, valid, depth, BLOCK: tl.constexpr, BN: tl.constexpr):
    """How the key blocks `indices[first:stop]` divide into tiles of BN keys before `end`.

    Returns (whole, rest): the number of tiles that lie before `end` entirely, and the number of
    keys before `end` in the one tile after them (0: there is none). Blocks are disjoint and
    ascending, so only the last that starts before `end` can reach past it; a binary search of
    `depth` steps drops those that start at or after it, which only `valid` makes possible. (Its
    loop has a fixed count: a `while` keeps Triton from specializing the whole kernel's warps.)
    """
    if valid is not None:
        low = first
        for _ in range(depth):
            middle = (low + stop) // 2
            before = tl.load(indices + middle, mask=low < stop, other=0) * BLOCK < end
            searching = low < stop
            low = tl.where(searching & before, middle + 1, low)
            stop = tl.where(searching & ~before, middle, stop)
    some = stop > first
    last = tl.load(indices + stop - 1, mask=some, other=0) * BLOCK
    keys = tl.minimum(end - last, BLOCK)
    whole = (stop - first - 1) * (BLOCK // BN) + keys // BN
    return tl.where(some, whole, 0), tl.where(some, keys % BN, 0)


@triton.jit
def tile_start(indices, first, i, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The token at which tile `i` of the block list that begins at `first` starts."""
    PER: tl.constexpr = BLOCK // TILE
    return tl.load(indices + first + i // PER) * BLOCK + (i % PER) * TILE


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the descriptors that a kernel builds; Triton asks for it at each launch.

    `triton.set_allocator` sets a context variable, and backward runs in a thread of autograd's own
    with a context of its own, so every launcher sets it anew.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


def copyable(*tensors: Tensor) -> bool:
    """Whether descriptors can read these [B, S, H, D] tensors: all is 16-byte aligned."""
    return all(
        x.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0)
            for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
        for x in tensors
    )
