"""Backward kernels for Hopper: dK and dV by columns of key blocks, then dQ by rows of queries.

These are the two passes of backward.py, with the same sums in the same order, on the groups and
rings of hopper.py. In both, the products of one tile run while the exponentials of the next are
computed. hopper_fused.py does the same in a single, faster pass where dQ need not be deterministic.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
    async_load,
    await_tile,
    barrier,
    claim,
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
from .lists import Lists
from .tiles import keys_end, own_start, tile_start, visible_tiles
from .tuning import HOPPER


@gluon.jit
def _copy_with_sums(tiles, sums, batch, start, head, row, slot, sums_slot, ready):
    """Start loading a tile of queries or output gradients together with its row sums."""
    mbarrier.expect(ready, tiles.block_type.nbytes + sums.block_type.nbytes)
    async_load(tiles, [batch, start, head, 0], ready, slot)
    async_load(sums, [row, start], ready, sums_slot)


@gluon.jit
def load_queries(
    queries, grads, lses, deltas, q_ring, do_ring, lse_slots, delta_slots,
    indices, first, tiles, batch, head, row, BLOCK: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Load a column's queries, output gradients and row sums in the producer, tile by tile."""
    for i in range(tiles):
        m = tile_start(indices, first, i, BLOCK, BM)
        slot, ready = claim(q_ring, i)
        lse = lse_slots.index(i % lse_slots.shape[0])
        _copy_with_sums(queries, lses, batch, m, head, row, slot, lse, ready)
        slot, ready = claim(do_ring, i)
        delta = delta_slots.index(i % delta_slots.shape[0])
        _copy_with_sums(grads, deltas, batch, m, head, row, slot, delta, ready)


@gluon.jit
def _produce_queries(
    queries, grads, keys, values, lses, deltas, k_slots, v_slots, kv_ready,
    q_ring, do_ring, lse_slots, delta_slots, indices, first, tiles, batch, head, row, start_n,
    BLOCK: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    if tiles > 0:
        for group in gl.static_range(CONSUMERS):
            start = start_n + group * ROWS
            ready = kv_ready.index(group)
            mbarrier.expect(ready, keys.block_type.nbytes + values.block_type.nbytes)
            async_load(keys, [batch, start, head, 0], ready, k_slots.index(group))
            async_load(values, [batch, start, head, 0], ready, v_slots.index(group))
    load_queries(
        queries, grads, lses, deltas, q_ring, do_ring, lse_slots, delta_slots,
        indices, first, tiles, batch, head, row, BLOCK, BM,
    )  # fmt: skip


@gluon.jit
def start_from(sums_slots, i, zeros):
    """Return an accumulator [64, BM] that starts from minus the row sum of each query."""
    SLOTS: gl.constexpr = sums_slots.shape[0]
    columns: gl.constexpr = gl.SliceLayout(0, zeros.type.layout)
    sums = sums_slots.index(i % SLOTS).reshape([zeros.shape[1]]).load(columns)
    return zeros - sums[None, :]


@gluon.jit
def _consume_queries(
    grad_keys, grad_values, k_slots, v_slots, kv_ready, q_ring, do_ring, lse_slots, delta_slots,
    tiles, batch, head, start_n, end, scale, scale_log2,
    GROUP: gl.constexpr, BM: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)

    zeros = gl.zeros([ROWS, BM], gl.float32, s_layout)
    dk = gl.zeros([ROWS, D], gl.float32, d_layout)
    dv = gl.zeros([ROWS, D], gl.float32, d_layout)
    k = matrix(k_slots.index(GROUP))
    v = matrix(v_slots.index(GROUP))
    if tiles > 0:
        mbarrier.wait(kv_ready.index(GROUP), 0)
        q_t = await_tile(q_ring, 0).permute((1, 0))
        s = warpgroup_mma(k, q_t, start_from(lse_slots, 0, zeros), is_async=True)
        do_t = await_tile(do_ring, 0).permute((1, 0))
        dp = warpgroup_mma(v, do_t, start_from(delta_slots, 0, zeros), is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale_log2)
        p_low = gl.convert_layout(p.to(k.dtype), a_layout)
        dp = warpgroup_mma_wait(0, deps=[dp])
        dv = warpgroup_mma(p_low, peek(do_ring, 0), dv, is_async=True)
        ds_low = gl.convert_layout((p * dp).to(k.dtype), a_layout)
        dv = warpgroup_mma_wait(0, deps=[dv])
        release(do_ring, 0)
        for i in range(1, tiles):
            q = await_tile(q_ring, i)
            start = start_from(lse_slots, i, zeros)
            s = warpgroup_mma(k, q.permute((1, 0)), start, is_async=True)
            do = await_tile(do_ring, i)
            start = start_from(delta_slots, i, zeros)
            dp = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
            dk = warpgroup_mma(ds_low, peek(q_ring, i - 1), dk, is_async=True)
            s = warpgroup_mma_wait(2, deps=[s])
            p = gl.exp2(s * scale_log2)
            p_low = gl.convert_layout(p.to(k.dtype), a_layout)
            dv = warpgroup_mma(p_low, do, dv, is_async=True)
            dp = warpgroup_mma_wait(2, deps=[dp])
            ds = p * dp
            dk = warpgroup_mma_wait(1, deps=[dk])
            release(q_ring, i - 1)
            ds_low = gl.convert_layout(ds.to(k.dtype), a_layout)
            dv = warpgroup_mma_wait(0, deps=[dv])
            release(do_ring, i)
        dk = warpgroup_mma(ds_low, peek(q_ring, tiles - 1), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=[dk])

    # A key affects only its own gradient row: rows past the end are zeroed here, not in the loop.
    start_n += GROUP * ROWS
    counts = (gl.arange(0, ROWS, gl.SliceLayout(1, d_layout)) < end - start_n)[:, None]
    dk = gl.where(counts, dk * scale, 0.0)
    dv = gl.where(counts, dv, 0.0)
    store(dk, grad_keys, batch, start_n, head, k_slots.index(GROUP))
    store(dv, grad_values, batch, start_n, head, v_slots.index(GROUP))


@gluon.jit
def _grad_kv_kernel(
    queries, grads, keys, values, lses, deltas, grad_keys, grad_values,
    indptr, indices, head_to_layout, valid, S, H, num_columns, scale, scale_log2,
    BLOCK: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
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

    k_slots = open_slots(keys, CONSUMERS)
    v_slots = open_slots(values, CONSUMERS)
    kv_ready = open_barriers(CONSUMERS, 1)
    q_ring = open_ring(queries, SLOTS)
    do_ring = open_ring(grads, SLOTS)
    lse_slots = open_slots(lses, SLOTS)
    delta_slots = open_slots(deltas, SLOTS)
    fence_async_shared()
    barrier()

    gl.warp_specialize(
        [
            (_consume_queries, (
                grad_keys, grad_values, k_slots, v_slots, kv_ready, q_ring, do_ring,
                lse_slots, delta_slots, tiles, batch, head, start_n, end, scale, scale_log2,
                0, BM, D,
            )),
            (_consume_queries, (
                grad_keys, grad_values, k_slots, v_slots, kv_ready, q_ring, do_ring,
                lse_slots, delta_slots, tiles, batch, head, start_n, end, scale, scale_log2,
                1, BM, D,
            )),
            (_produce_queries, (
                queries, grads, keys, values, lses, deltas, k_slots, v_slots, kv_ready,
                q_ring, do_ring, lse_slots, delta_slots, indices, first, tiles, batch, head, row,
                start_n, BLOCK, BM,
            )),
        ],
        [WARPS, PRODUCER_WARPS],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    close_barriers(kv_ready)
    close_ring(q_ring)
    close_ring(do_ring)


@gluon.jit
def _produce_keys(
    queries, grads, keys, values, base_k, stride_k, q_slots, do_slots, q_ready, k_ring, v_ring,
    indices, first, tiles, batch, head, start_m, end,
    BLOCK: gl.constexpr, BN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    for group in gl.static_range(CONSUMERS):
        start = start_m + group * ROWS
        ready = q_ready.index(group)
        mbarrier.expect(ready, queries.block_type.nbytes + grads.block_type.nbytes)
        async_load(queries, [batch, start, head, 0], ready, q_slots.index(group))
        async_load(grads, [batch, start, head, 0], ready, do_slots.index(group))
    for i in range(tiles):
        n = tile_start(indices, first, tiles - 1 - i, BLOCK, BN)
        slot, ready = claim(k_ring, i)
        copy_before(keys, base_k, stride_k, batch, n, head, end, slot, ready, CUT)
        slot, ready = claim(v_ring, i)
        copy(values, batch, n, head, slot, ready)  # a masked value only affects masked ds


@gluon.jit
def _consume_keys(
    grad_queries, lse, delta, q_slots, do_slots, q_ready, k_ring, v_ring,
    tiles, rest, batch, head, start_m, scale, scale_log2,
    GROUP: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)

    start_m += GROUP * ROWS
    m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    lse2 = (gl.load(lse + m) * scale_log2)[:, None]
    delta = gl.load(delta + m)[:, None]
    zeros = gl.zeros([ROWS, BN], gl.float32, s_layout)
    dq = gl.zeros([ROWS, D], gl.float32, d_layout)
    q = matrix(q_slots.index(GROUP))
    do = matrix(do_slots.index(GROUP))
    mbarrier.wait(q_ready.index(GROUP), 0)
    if tiles > 0:
        k_t = await_tile(k_ring, 0).permute((1, 0))
        s = warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)
        v_t = await_tile(v_ring, 0).permute((1, 0))
        dp = warpgroup_mma(do, v_t, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale_log2 - lse2)
        dp = warpgroup_mma_wait(0, deps=[dp])
        release(v_ring, 0)
        ds = p * (dp - delta)
        if RAGGED:
            ds = gl.where(gl.arange(0, BN, gl.SliceLayout(0, s_layout))[None, :] < rest, ds, 0.0)
        ds_low = gl.convert_layout(ds.to(q.dtype), a_layout)
        for i in range(1, tiles):
            k = await_tile(k_ring, i)
            s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            v = await_tile(v_ring, i)
            dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dq = warpgroup_mma(ds_low, peek(k_ring, i - 1), dq, is_async=True)
            s = warpgroup_mma_wait(2, deps=[s])
            p = gl.exp2(s * scale_log2 - lse2)
            dp = warpgroup_mma_wait(1, deps=[dp])
            release(v_ring, i)
            ds = p * (dp - delta)
            dq = warpgroup_mma_wait(0, deps=[dq])
            release(k_ring, i - 1)
            ds_low = gl.convert_layout(ds.to(q.dtype), a_layout)
        dq = warpgroup_mma(ds_low, peek(k_ring, tiles - 1), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
    store(dq * scale, grad_queries, batch, start_m, head, q_slots.index(GROUP))


@gluon.jit
def _grad_q_kernel(
    queries, grads, keys, values, grad_queries, K, Lse, Delta,
    indptr, indices, head_to_layout, valid,
    k_b, k_s, k_h, S, H, num_rows, padded, depth, scale, scale_log2,
    BLOCK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    RAGGED: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    batch = gl.program_id(1) // H
    head = gl.program_id(1) % H
    start_m = own_start(BLOCK, BLOCK)
    row = gl.load(head_to_layout + head) * (num_rows + 1) + start_m // BLOCK
    first = gl.load(indptr + row)
    stop = gl.load(indptr + row + 1)
    end = keys_end(valid, batch, S)
    whole, rest = visible_tiles(indices, first, stop, end, valid, depth, BLOCK, BN)
    tiles = whole + (rest > 0).to(gl.int32)
    rest = gl.where(rest > 0, rest, BN)

    q_slots = open_slots(queries, CONSUMERS)
    do_slots = open_slots(grads, CONSUMERS)
    q_ready = open_barriers(CONSUMERS, 1)
    k_ring = open_ring(keys, SLOTS)
    v_ring = open_ring(values, SLOTS)
    fence_async_shared()
    barrier()

    base_k = K + batch.to(gl.int64) * k_b + head.to(gl.int64) * k_h
    sums = gl.program_id(1).to(gl.int64) * padded
    CUT: gl.constexpr = valid is not None
    gl.warp_specialize(
        [
            (_consume_keys, (
                grad_queries, Lse + sums, Delta + sums, q_slots, do_slots, q_ready, k_ring, v_ring,
                tiles, rest, batch, head, start_m, scale, scale_log2, 0, BN, D, RAGGED,
            )),
            (_consume_keys, (
                grad_queries, Lse + sums, Delta + sums, q_slots, do_slots, q_ready, k_ring, v_ring,
                tiles, rest, batch, head, start_m, scale, scale_log2, 1, BN, D, RAGGED,
            )),
            (_produce_keys, (
                queries, grads, keys, values, base_k, k_s, q_slots, do_slots, q_ready,
                k_ring, v_ring, indices, first, tiles, batch, head, start_m, end, BLOCK, BN, CUT,
            )),
        ],
        [WARPS, PRODUCER_WARPS],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    close_barriers(q_ready)
    close_ring(k_ring)
    close_ring(v_ring)


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
    """Launch the three kernels for dq, dk, dv; `out` and `lse` are the forward's, contiguous."""
    batch, tokens, heads, head_dim = q.shape
    num_blocks = lists.row_indptr.shape[1] - 1
    padded = num_blocks * lists.block
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    # Scores start from minus lse, so lse must be in their unit, before the scale.
    sums = row_sums(out, grad_out, lse, grad_lse, lists.block, 1 / scale)
    grid = num_blocks, batch * heads
    rows = ROWS.value
    scales = scale, scale * LOG2_E.value
    own = [tiles_of(x, rows) for x in (q, grad_out)]
    with torch.cuda.device_of(q):
        pipeline = HOPPER[head_dim].grad_kv
        _grad_kv_kernel[grid](
            *(tiles_of(x, pipeline.tile) for x in (q, grad_out)),
            *(tiles_of(x, rows) for x in (k, v)),
            *(sums_of(x.view(-1, padded), 1, pipeline.tile) for x in sums),
            *(tiles_of(x, rows) for x in (dk, dv)),
            lists.col_indptr, lists.col_indices, lists.head_to_layout, lists.valid,
            tokens, heads, num_blocks, *scales,
            BLOCK=lists.block, BM=pipeline.tile, D=head_dim, SLOTS=pipeline.slots,
            REGISTERS=pipeline.registers, PRODUCER_REGISTERS=pipeline.producer_registers,
            num_warps=WARPS.value,
        )  # fmt: skip
        pipeline = HOPPER[head_dim].grad_q
        _grad_q_kernel[grid](
            *own, *(tiles_of(x, pipeline.tile) for x in (k, v)), tiles_of(dq, rows),
            k, *sums, lists.row_indptr, lists.row_indices, lists.head_to_layout, lists.valid,
            *k.stride()[:3], tokens, heads, num_blocks, padded, num_blocks.bit_length(), *scales,
            BLOCK=lists.block, BN=pipeline.tile, D=head_dim, SLOTS=pipeline.slots,
            RAGGED=lists.valid is not None or tokens % pipeline.tile != 0,
            REGISTERS=pipeline.registers, PRODUCER_REGISTERS=pipeline.producer_registers,
            num_warps=WARPS.value,
        )  # fmt: skip
    return dq, dk, dv
