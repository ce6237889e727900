"""Backward kernel for Hopper in one pass: dK, dV and dQ by columns of key blocks, five products.

A program walks a column as the first of the two passes in hopper_backward.py does. It also computes
its part of dQ, which the copy engine adds to memory in fp32 (FlashAttention-3, Shah et al. 2024).
Programs of other columns add to the same queries in no fixed order: repeated dQ are not bit-equal,
dK and dV are.

Scores are transposed, keys by queries. For dQ each consumer needs the ds of both, so ds goes
through shared memory, and each computes a part [64, 64] over all 128 keys: half of the channels, or
half of the queries at head_dim 64, where a tile has 128 queries. Such a part is a chunk of the sum.
It lies in memory in the order in which the threads hold it; the kernel that rounds dQ reorders it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .backward import row_sums
from .forward import LOG2_E
from .hopper import (
    CONSUMERS,
    PRODUCER_WARPS,
    ROWS,
    WARPS,
    async_add,
    await_tile,
    barrier,
    close_barriers,
    close_ring,
    copy,
    copy_before,
    matrix,
    open_barriers,
    open_ring,
    open_slots,
    peek,
    release,
    store,
    sums_of,
    tiles_of,
)
from .hopper_backward import load_queries, start_from
from .lists import Lists
from .tiles import keys_end, own_start, tile_start
from .tuning import HOPPER

CHUNK = gl.constexpr(64)  # a chunk is CHUNK queries by CHUNK channels
CHUNK_ROWS = gl.constexpr(16)  # the copy engine sees a chunk as 16 rows of 256 fp32


@gluon.jit
def _produce(
    queries, grads, keys, values, base_k, stride_k, lses, deltas, k_slots, v_slots,
    k_ready, v_ready, q_ring, do_ring, lse_slots, delta_slots,
    indices, first, tiles, batch, head, row, start_n, end,
    BLOCK: gl.constexpr, BM: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    if tiles > 0:
        for group in gl.static_range(CONSUMERS):
            start = start_n + group * ROWS
            slot, ready = k_slots.index(group), k_ready.index(group)
            copy_before(keys, base_k, stride_k, batch, start, head, end, slot, ready, CUT)
            copy(values, batch, start, head, v_slots.index(group), v_ready.index(group))
    load_queries(
        queries, grads, lses, deltas, q_ring, do_ring, lse_slots, delta_slots,
        indices, first, tiles, batch, head, row, BLOCK, BM,
    )  # fmt: skip


@gluon.jit
def _share(ds, slot, ready, keys, RAGGED: gl.constexpr):
    """Share a group's ds [64, BM] with the other group, with rows from `keys` on set to 0."""
    if RAGGED:
        inside = gl.arange(0, ROWS, gl.SliceLayout(1, ds.type.layout)) < keys
        ds = gl.where(inside[:, None], ds, 0.0)
    slot.store(ds.to(slot.dtype))
    fence_async_shared()
    barrier()
    mbarrier.arrive(ready)


@gluon.jit
def _multiply_into_dq(ds_slots, pair, k_slots, zeros, GROUP: gl.constexpr):
    """Issue the two products of a group's chunk; the caller waits for them."""
    D: gl.constexpr = k_slots.shape[4]
    dq = zeros
    for j in gl.static_range(CONSUMERS):
        k = matrix(k_slots.index(j))
        ds = ds_slots.index(pair * CONSUMERS + j)
        if D > CHUNK:
            k = k.slice(GROUP * CHUNK, CHUNK, dim=1)
        else:
            ds = ds.slice(GROUP * CHUNK, CHUNK, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=j > 0, is_async=True)
    return dq


@gluon.jit
def _add(dq, sums, chunk, slot):
    """Start adding a chunk to memory through its slot, once the previous one has been read from it.

    A thread holds pairs of neighbouring channels, in rows 8 and channels 8 apart. Here four of its
    values stand together, after those of the previous thread, so writing them causes no bank
    conflicts.
    """
    parts = dq.reshape([4, 2, 8, CHUNK // 16, 2, 4, 2])
    rows = parts.permute((0, 1, 3, 2, 5, 4, 6)).reshape([CHUNK_ROWS, 256])
    tma.store_wait(0)
    barrier()
    slot.store(rows)
    fence_async_shared()
    barrier()
    async_add(sums, [chunk * CHUNK_ROWS, 0], slot)


@gluon.jit
def _consume(
    grad_keys, grad_values, sum_queries, k_slots, v_slots, k_ready, v_ready, q_ring, do_ring,
    lse_slots, delta_slots, ds_slots, ds_ready, ds_free, dq_slots, done,
    indices, first, tiles, batch, head, first_chunk, start_n, end, scale, scale_log2,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, BM: gl.constexpr, D: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    CHANNELS: gl.constexpr = D // CHUNK  # chunks side by side

    zeros = gl.zeros([ROWS, BM], gl.float32, s_layout)
    no_dq = gl.zeros([CHUNK, CHUNK], gl.float32, dq_layout)
    dk = gl.zeros([ROWS, D], gl.float32, d_layout)
    dv = gl.zeros([ROWS, D], gl.float32, d_layout)
    start_n += GROUP * ROWS
    keys = end - start_n  # unmasked keys of this group
    first_chunk += GROUP
    if tiles > 0:
        k = matrix(k_slots.index(GROUP))
        v = matrix(v_slots.index(GROUP))
        for group in gl.static_range(CONSUMERS):
            mbarrier.wait(k_ready.index(group), 0)
        q_t = await_tile(q_ring, 0).permute((1, 0))
        s = warpgroup_mma(k, q_t, start_from(lse_slots, 0, zeros), is_async=True)
        mbarrier.wait(v_ready.index(GROUP), 0)
        do = await_tile(do_ring, 0)
        dp = warpgroup_mma(v, do.permute((1, 0)), start_from(delta_slots, 0, zeros), is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale_log2)
        p_low = gl.convert_layout(p.to(k.dtype), a_layout)
        dv = warpgroup_mma(p_low, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        _share(p * dp, ds_slots.index(GROUP), ds_ready.index(0), keys, RAGGED)
        dv = warpgroup_mma_wait(0, deps=[dv])
        release(do_ring, 0)
        for i in range(1, tiles):
            # The pair of slots that holds the previous tile's ds.
            pair = (i - 1) & 1
            m = tile_start(indices, first, i - 1, BLOCK, BM)
            q_t = await_tile(q_ring, i).permute((1, 0))
            s = warpgroup_mma(k, q_t, start_from(lse_slots, i, zeros), is_async=True)
            do = await_tile(do_ring, i)
            start = start_from(delta_slots, i, zeros)
            dp = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
            ds = ds_slots.index(pair * CONSUMERS + GROUP)
            dk = warpgroup_mma(ds, peek(q_ring, i - 1), dk, is_async=True)
            s = warpgroup_mma_wait(2, deps=[s])
            p = gl.exp2(s * scale_log2)
            p_low = gl.convert_layout(p.to(k.dtype), a_layout)
            dv = warpgroup_mma(p_low, do, dv, is_async=True)
            dp = warpgroup_mma_wait(2, deps=[dp])
            mbarrier.wait(ds_free.index(i & 1), (i >> 1 & 1) ^ 1)
            ds = ds_slots.index((i & 1) * CONSUMERS + GROUP)
            _share(p * dp, ds, ds_ready.index(i & 1), keys, RAGGED)
            mbarrier.wait(ds_ready.index(pair), (i - 1 >> 1) & 1)
            dq = _multiply_into_dq(ds_slots, pair, k_slots, no_dq, GROUP)
            dk = warpgroup_mma_wait(3, deps=[dk])
            release(q_ring, i - 1)
            dv = warpgroup_mma_wait(2, deps=[dv])
            release(do_ring, i)
            dq = warpgroup_mma_wait(0, deps=[dq])
            barrier()
            mbarrier.arrive(ds_free.index(pair))
            _add(dq, sum_queries, first_chunk + m // CHUNK * CHANNELS, dq_slots.index(GROUP))
        pair = (tiles - 1) & 1
        m = tile_start(indices, first, tiles - 1, BLOCK, BM)
        ds = ds_slots.index(pair * CONSUMERS + GROUP)
        dk = warpgroup_mma(ds, peek(q_ring, tiles - 1), dk, is_async=True)
        mbarrier.wait(ds_ready.index(pair), (tiles - 1 >> 1) & 1)
        dq = _multiply_into_dq(ds_slots, pair, k_slots, no_dq, GROUP)
        dk, dq = warpgroup_mma_wait(0, deps=[dk, dq])
        _add(dq, sum_queries, first_chunk + m // CHUNK * CHANNELS, dq_slots.index(GROUP))

    # Both groups read all of k for their parts of dq: dk may overwrite it only when both are done.
    barrier()
    mbarrier.arrive(done.index(0))
    mbarrier.wait(done.index(0), 0)
    # A key affects only its own gradient row: rows past the end are zeroed here, not in the loop.
    counts = (gl.arange(0, ROWS, gl.SliceLayout(1, d_layout)) < keys)[:, None]
    dk = gl.where(counts, dk * scale, 0.0)
    dv = gl.where(counts, dv, 0.0)
    store(dk, grad_keys, batch, start_n, head, k_slots.index(GROUP))
    store(dv, grad_values, batch, start_n, head, v_slots.index(GROUP))


@gluon.jit
def _gradients_kernel(
    queries, grads, keys, values, lses, deltas, grad_keys, grad_values, sum_queries, K,
    indptr, indices, head_to_layout, valid, k_b, k_s, k_h, S, H, num_columns, scale, scale_log2,
    BLOCK: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    RAGGED: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    row = gl.program_id(1)
    batch = row // H
    head = row % H
    start_n = own_start(BLOCK, BLOCK)
    column = gl.load(head_to_layout + head) * (num_columns + 1) + start_n // BLOCK
    first = gl.load(indptr + column)
    tiles = (gl.load(indptr + column + 1) - first) * (BLOCK // BM)
    end = keys_end(valid, batch, S)
    tiles = gl.where(start_n < end, tiles, 0)
    first_chunk = row * num_columns * (BLOCK // CHUNK) * (D // CHUNK)

    k_slots = open_slots(keys, CONSUMERS)
    v_slots = open_slots(values, CONSUMERS)
    k_ready = open_barriers(CONSUMERS, 1)
    v_ready = open_barriers(CONSUMERS, 1)
    q_ring = open_ring(queries, SLOTS)
    do_ring = open_ring(grads, SLOTS - 1)  # gradients are released one tile before queries
    lse_slots = open_slots(lses, SLOTS)
    delta_slots = open_slots(deltas, SLOTS - 1)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ds_slots = gl.allocate_shared_memory(keys.dtype, [2 * CONSUMERS, ROWS, BM], ds_layout)
    ds_ready = open_barriers(2, CONSUMERS)
    ds_free = open_barriers(2, CONSUMERS)
    dq_slots = open_slots(sum_queries, CONSUMERS)
    done = open_barriers(1, CONSUMERS)
    fence_async_shared()
    barrier()

    base_k = K + batch.to(gl.int64) * k_b + head.to(gl.int64) * k_h
    CUT: gl.constexpr = valid is not None
    gl.warp_specialize(
        [
            (_consume, (
                grad_keys, grad_values, sum_queries, k_slots, v_slots, k_ready, v_ready,
                q_ring, do_ring, lse_slots, delta_slots, ds_slots, ds_ready, ds_free, dq_slots,
                done, indices, first, tiles, batch, head, first_chunk, start_n, end,
                scale, scale_log2, 0, BLOCK, BM, D, RAGGED,
            )),
            (_consume, (
                grad_keys, grad_values, sum_queries, k_slots, v_slots, k_ready, v_ready,
                q_ring, do_ring, lse_slots, delta_slots, ds_slots, ds_ready, ds_free, dq_slots,
                done, indices, first, tiles, batch, head, first_chunk, start_n, end,
                scale, scale_log2, 1, BLOCK, BM, D, RAGGED,
            )),
            (_produce, (
                queries, grads, keys, values, base_k, k_s, lses, deltas, k_slots, v_slots,
                k_ready, v_ready, q_ring, do_ring, lse_slots, delta_slots,
                indices, first, tiles, batch, head, row, start_n, end, BLOCK, BM, CUT,
            )),
        ],
        [WARPS, PRODUCER_WARPS],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    close_barriers(k_ready)
    close_barriers(v_ready)
    close_ring(q_ring)
    close_ring(do_ring)
    close_barriers(ds_ready)
    close_barriers(ds_free)
    close_barriers(done)


@triton.jit
def _round_kernel(Sums, GradQ, S, H, chunks, scale, D: tl.constexpr, CHUNK: tl.constexpr):
    """Scale and round dQ from its fp32 sum, one program per chunk, undoing the order of `_add`."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    CHANNELS: tl.constexpr = D // CHUNK
    start = (row * chunks + chunk) * CHUNK * CHUNK
    x = tl.load(Sums + start + tl.arange(0, CHUNK * CHUNK)) * scale
    parts = x.reshape([4, 2, CHUNK // 16, 8, 4, 2, 2]).permute((0, 1, 3, 2, 5, 4, 6))
    tile = parts.reshape([CHUNK, CHUNK]).to(GradQ.dtype.element_ty)
    m = chunk // CHANNELS * CHUNK + tl.arange(0, CHUNK)
    d = chunk % CHANNELS * CHUNK + tl.arange(0, CHUNK)
    token = row // H * S + m
    place = GradQ + (token * H + row % H)[:, None] * D + d[None, :]
    tl.store(place, tile, mask=(m < S)[:, None])


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three kernels for dq, dk, dv; `out` and `lse` are the forward's, contiguous.

    It allocates an fp32 buffer of dq's size.
    """
    batch, tokens, heads, head_dim = q.shape
    num_blocks = lists.col_indptr.shape[1] - 1
    padded = num_blocks * lists.block
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    # Scores start from minus lse, so lse must be in their unit, before the scale.
    sums = row_sums(out, grad_out, lse, grad_lse, lists.block, 1 / scale)
    chunks = padded * head_dim // CHUNK.value**2
    dq_sums = q.new_zeros(batch * heads * chunks * CHUNK_ROWS.value, 256, dtype=torch.float32)
    pipeline = HOPPER[head_dim].fused
    rows = ROWS.value
    with torch.cuda.device_of(q):
        _gradients_kernel[num_blocks, batch * heads](
            *(tiles_of(x, pipeline.tile) for x in (q, grad_out)),
            *(tiles_of(x, rows) for x in (k, v)),
            *(sums_of(x.view(-1, padded), 1, pipeline.tile) for x in sums),
            *(tiles_of(x, rows) for x in (dk, dv)),
            sums_of(dq_sums, CHUNK_ROWS.value, 256),
            k, lists.col_indptr, lists.col_indices, lists.head_to_layout, lists.valid,
            *k.stride()[:3], tokens, heads, num_blocks, scale, scale * LOG2_E.value,
            BLOCK=lists.block, BM=pipeline.tile, D=head_dim, SLOTS=pipeline.slots,
            RAGGED=lists.valid is not None or tokens % lists.block != 0,
            REGISTERS=pipeline.registers, PRODUCER_REGISTERS=pipeline.producer_registers,
            num_warps=WARPS.value,
        )  # fmt: skip
        _round_kernel[chunks, batch * heads](
            dq_sums, dq, tokens, heads, chunks, scale, D=head_dim, CHUNK=CHUNK.value, num_warps=4
        )
    return dq, dk, dv
