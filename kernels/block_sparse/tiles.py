"""Device-side pieces shared by the forward and backward kernels.

A kernel sees one head of one sample as a [tokens, D] matrix with a row stride; `load_rows` and
`store_rows` move tiles of it. All offsets are 64-bit: tokens x heads x head_dim passes 2**31
elements in real use. The functions that walk the block lists are scalar and serve the Hopper
kernels too.
"""

import triton
import triton.language as tl


@triton.jit
def own_start(BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Return the first token of this program's tile; the last four blocks are launched first.

    Text is dense and comes last in a sequence: its rows and columns take several times as long as
    any others, and would run on alone if started last. (Sink frames are at the front already.)
    """
    tiles = tl.num_programs(0)
    last = tl.minimum(4 * (BLOCK // TILE), tiles)
    return (tl.program_id(0) + tiles - last) % tiles * TILE


@triton.jit
def _pointers(base, start, stride, ROWS: tl.constexpr, D: tl.constexpr):
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    return base + rows[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(
    base, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Load the tile [ROWS, D] at row `start`, zero past `end`; a `WHOLE` tile ends before `end`."""
    if WHOLE:
        return tl.load(_pointers(base, start, stride, ROWS, D))
    else:
        inside = start + tl.arange(0, ROWS) < end
        return tl.load(_pointers(base, start, stride, ROWS, D), mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(base, tile, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """Store the tile [ROWS, D] at row `start`, except the rows past `end`."""
    inside = start + tl.arange(0, ROWS) < end
    tl.store(_pointers(base, start, stride, ROWS, D), tile, mask=inside[:, None])


@triton.jit
def keys_end(valid, batch, S):
    """Return one past the last key of this sample that is not masked."""
    if valid is None:
        return S
    else:
        return tl.minimum(tl.load(valid + batch), S)


@triton.jit
def visible_tiles(indices, first, stop, end, valid, depth, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Divide the key blocks `indices[first:stop]` into tiles of BN keys before `end`.

    Returns (whole, rest): the number of tiles that lie before `end` entirely, and the number of
    keys before `end` in the one tile after them, 0 if there is none. Blocks are disjoint and
    ascending, so only the last that starts before `end` can extend past it. A binary search of
    `depth` steps drops the blocks that start at or after `end`, which exist only with `valid`.
    """
    if valid is not None:
        low = first
        for _ in range(depth):
            middle = (low + stop) // 2
            before = tl.load(indices + middle, mask=low < stop, other=0) * BLOCK < end
            searching = low < stop
            low = tl.where(searching & before, middle + 1, low)
            stop = tl.where(searching & ~before, middle, stop)
    nonempty = stop > first
    last = tl.load(indices + stop - 1, mask=nonempty, other=0) * BLOCK
    keys = tl.minimum(end - last, BLOCK)
    whole = (stop - first - 1) * (BLOCK // BN) + keys // BN
    return tl.where(nonempty, whole, 0), tl.where(nonempty, keys % BN, 0)


@triton.jit
def tile_start(indices, first, i, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Return the first token of tile `i` of the block list that begins at `first`."""
    PER: tl.constexpr = BLOCK // TILE
    return tl.load(indices + first + i // PER) * BLOCK + (i % PER) * TILE
