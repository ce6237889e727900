"""Shared parts of the Hopper kernels: rings of tiles in shared memory, barriers, tensor maps.

On compute capability 9.0 the kernels are written in Gluon, the lower level of Triton, where warps,
barriers and the asynchronous tensor cores are explicit. A program has three groups. The producer,
one warp, walks the block list and makes the bulk copy engine (TMA) load tiles. Two consumers, of
four warps and 64 rows each, take turns: one multiplies while the other computes exponentials
(FlashAttention-3, Shah et al. 2024, section 3.1).

Tiles go through rings of a few slots. A ring is the tuple (slots, ready, free): shared memory
[slots, 1, rows, 1, D], and for each slot a barrier for "has been filled" and one for "both
consumers are done with it". Tile number i, counted from 0, lies in slot i % slots.
"""

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# These were renamed after Triton 3.6: the first in 3.7, the others in 3.9.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def _async_add(descriptor, coordinates, source, _semantic=None):
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    place = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, place, source.handle)


# Gluon has a public name for this from Triton 3.8 on; the compiler has had the operation before.
async_add = getattr(tma, "async_atomic_add", None) or _async_add

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # rows per consumer: the height of a tensor-core instruction
WARPS = gl.constexpr(4)  # warps per consumer
PRODUCER_WARPS = gl.constexpr(1)  # one warp issues all copies; more would only wait


@gluon.jit
def open_barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate barriers [NUM, 1], each of which completes after `ARRIVALS` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def close_barriers(barriers):
    """Invalidate barriers; call it after the groups have joined.

    It also keeps the allocator from reusing the barriers' memory while they are in use, a fault
    that Triton's own warp specialization had (README.md).
    """
    NUM: gl.constexpr = barriers.shape[0]
    for i in gl.static_range(NUM):
        mbarrier.invalidate(barriers.index(i))


@gluon.jit
def open_slots(descriptor, SLOTS: gl.constexpr):
    """Allocate shared memory for `SLOTS` tiles of a descriptor."""
    shape: gl.constexpr = [SLOTS] + descriptor.block_type.shape
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def open_ring(descriptor, SLOTS: gl.constexpr):
    """Allocate a ring: (slots, ready, free)."""
    return open_slots(descriptor, SLOTS), open_barriers(SLOTS, 1), open_barriers(SLOTS, CONSUMERS)


@gluon.jit
def close_ring(ring):
    """Invalidate a ring's barriers."""
    _, ready, free = ring
    close_barriers(ready)
    close_barriers(free)


@gluon.jit
def matrix(slot):
    """View the tile [1, rows, 1, D] in a slot as a matrix [rows, D]."""
    return slot.reshape([slot.shape[1], slot.shape[3]])


@gluon.jit
def claim(ring, i):
    """Wait in the producer until the slot of tile `i` is free; return it and its ready barrier."""
    slots, ready, free = ring
    SLOTS: gl.constexpr = slots.shape[0]
    mbarrier.wait(free.index(i % SLOTS), (i // SLOTS & 1) ^ 1)
    return slots.index(i % SLOTS), ready.index(i % SLOTS)


@gluon.jit
def copy(descriptor, batch, start, head, slot, ready):
    """Start loading rows [start, start + rows) of a head into a slot; past the end they are 0."""
    mbarrier.expect(ready, descriptor.block_type.nbytes)
    async_load(descriptor, [batch, start, head, 0], ready, slot)


@gluon.jit
def copy_before(
    descriptor, base, stride, batch, start, head, end, slot, ready, CUT: gl.constexpr
):  # fmt: skip
    """Start loading as `copy` does, but with rows from `end` on, which may hold anything, as 0.

    `base` points to the head's first row, and rows are `stride` elements apart. Without `CUT` no
    row of the tensor lies past `end`.
    """
    if CUT:
        if start + slot.shape[1] > end:
            _copy_through_registers(base, stride, start, end, matrix(slot))
            fence_async_shared()
            barrier()
            mbarrier.arrive(ready)
        else:
            copy(descriptor, batch, start, head, slot, ready)
    else:
        copy(descriptor, batch, start, head, slot, ready)


@gluon.jit
def _copy_through_registers(base, stride, start, end, tile):
    D: gl.constexpr = tile.shape[1]
    STEP: gl.constexpr = 8  # rows at a time: the producer has few registers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [PRODUCER_WARPS, 1], [1, 0])
    row = gl.arange(0, STEP, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    for i in gl.static_range(tile.shape[0] // STEP):
        m = start + i * STEP + row
        place = base + m.to(gl.int64)[:, None] * stride + column[None, :]
        rows = gl.load(place, mask=(m < end)[:, None], other=0.0)
        tile.slice(i * STEP, STEP, dim=0).store(rows)
        barrier()  # otherwise the compiler loads the rows of all steps at once and spills them


@gluon.jit
def await_tile(ring, i):
    """Wait in a consumer for tile `i`; return it as a matrix [rows, D]."""
    slots, ready, _ = ring
    SLOTS: gl.constexpr = slots.shape[0]
    mbarrier.wait(ready.index(i % SLOTS), i // SLOTS & 1)
    return matrix(slots.index(i % SLOTS))


@gluon.jit
def peek(ring, i):
    """Return tile `i`, which the consumer has awaited and not yet released, as a matrix."""
    slots, _, _ = ring
    return matrix(slots.index(i % slots.shape[0]))


@gluon.jit
def release(ring, i):
    """Release tile `i` once the consumer's four warps are done; one thread arrives for them."""
    slots, _, free = ring
    barrier()
    mbarrier.arrive(free.index(i % slots.shape[0]))


@gluon.jit
def store(tile, descriptor, batch, start, head, slot):
    """Store a consumer's tile [rows, D] through shared memory; rows past the end are dropped."""
    matrix(slot).store(tile.to(descriptor.dtype))
    fence_async_shared()
    barrier()
    async_store(descriptor, [batch, start, head, 0], slot)
    tma.store_wait(0)


def tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe a 16-bit [B, S, H, D] tensor to the copy engine, in tiles of `rows` tokens."""
    # The stride of a dimension of size 1 is never used, but must be a valid stride.
    strides = [s if n > 1 else x.shape[3] for n, s in zip(x.shape, x.stride(), strict=True)]
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, rows, 1, x.shape[3]], layout)


def sums_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe an fp32 matrix to the copy engine, in tiles of `rows` by `columns`."""
    layout = gl.NVMMASharedLayout(0, 32, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
