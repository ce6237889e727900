"""Forward kernel for Hopper: two groups of 64 queries, one multiplies during the other's softmax.

Products overlap with softmax within a group too: while a tile's probabilities are computed, those
of the previous tile are multiplied with their values (FlashAttention-3, Shah et al. 2024, section
3.2). Tiles are walked from the last to the first, so only the first one walked can need a mask.
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

from .forward import LN_2, LOG2_E
from .hopper import (
    CONSUMERS,
    PRODUCER_WARPS,
    ROWS,
    WARPS,
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
    release,
    store,
    tiles_of,
)
from .lists import Lists
from .tiles import keys_end, own_start, tile_start, visible_tiles
from .tuning import HOPPER


@gluon.jit
def _produce(
    queries, keys, values, base_v, stride_v, q_slots, q_ready, k_ring, v_ring,
    indices, first, tiles, batch, head, start_m, end,
    BLOCK: gl.constexpr, BN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    for group in gl.static_range(CONSUMERS):
        start = start_m + group * ROWS
        copy(queries, batch, start, head, q_slots.index(group), q_ready.index(group))
    for i in range(tiles):
        n = tile_start(indices, first, tiles - 1 - i, BLOCK, BN)
        slot, ready = claim(k_ring, i)
        copy(keys, batch, n, head, slot, ready)  # a masked key only affects masked scores
        slot, ready = claim(v_ring, i)
        copy_before(values, base_v, stride_v, batch, n, head, end, slot, ready, CUT)


@gluon.jit
def _row_sum(p, NARROW: gl.constexpr):
    """Sum p over keys, per row [64], or with `NARROW` per thread's part of a row, [64, 4]."""
    if NARROW:
        return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)
    else:
        return gl.sum(p, 1)


@gluon.jit
def _consume(
    outputs, Lse, q_slots, q_ready, k_ring, v_ring, turns,
    tiles, rest, batch, head, start_m, S, scale_log2,
    GROUP: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    # Narrow heads take as long for exponentials as for products: the groups take turns at issuing
    # products, so that they do not do the same thing at the same time.
    NARROW: gl.constexpr = D <= 64
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)

    no_s = gl.zeros([ROWS, BN], gl.float32, s_layout)
    out = gl.zeros([ROWS, D], gl.float32, o_layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    total = _row_sum(no_s, NARROW)
    mbarrier.wait(q_ready.index(GROUP), 0)
    # q is kept in registers, so that products read one operand from shared memory, not two.
    q = matrix(q_slots.index(GROUP)).load(gl.DotOperandLayout(0, s_layout, 2))
    if tiles > 0:
        k_t = await_tile(k_ring, 0).permute((1, 0))
        s = warpgroup_mma(q, k_t, no_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        release(k_ring, 0)
        if RAGGED:
            s = gl.where(
                gl.arange(0, BN, gl.SliceLayout(0, s_layout))[None, :] < rest, s, float("-inf")
            )
        # Every tile holds an unmasked key, so `top` is finite and no exponent is inf - inf.
        top = gl.max(s, 1) * scale_log2
        p = gl.exp2(s * scale_log2 - top[:, None])
        total = _row_sum(p, NARROW)
        p_low = gl.convert_layout(p.to(q.dtype), p_layout)
        for i in range(1, tiles):
            k = await_tile(k_ring, i)
            if NARROW:
                mbarrier.wait(turns.index(GROUP), (i - 1) & 1)
            s = warpgroup_mma(q, k.permute((1, 0)), no_s, use_acc=False, is_async=True)
            out = warpgroup_mma(p_low, await_tile(v_ring, i - 1), out, is_async=True)
            if NARROW:
                mbarrier.arrive(turns.index(1 - GROUP))
            s = warpgroup_mma_wait(1, deps=[s])
            release(k_ring, i)
            higher = gl.maximum(top, gl.max(s, 1) * scale_log2)
            p = gl.exp2(s * scale_log2 - higher[:, None])
            shrink = gl.exp2(top - higher)
            top = higher
            if NARROW:
                total *= gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
            else:
                total *= shrink
            total += _row_sum(p, NARROW)
            out = warpgroup_mma_wait(0, deps=[out])
            release(v_ring, i - 1)
            out *= gl.convert_layout(shrink, o_rows)[:, None]
            p_low = gl.convert_layout(p.to(q.dtype), p_layout)
        out = warpgroup_mma(p_low, await_tile(v_ring, tiles - 1), out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])

    # A row that sees no key: 0 / 1 = 0, and top = -inf makes its log-sum-exp -inf.
    if NARROW:
        total = gl.convert_layout(gl.sum(total, 1), s_rows)
    total = gl.where(total > 0, total, 1.0)
    lse = (top + gl.log2(total)) * LN_2
    start = start_m + GROUP * ROWS
    m = gl.arange(0, ROWS, s_rows)
    gl.store(Lse + start + m, lse, mask=m < S - start)
    out *= gl.convert_layout(1.0 / total, o_rows)[:, None]
    store(out, outputs, batch, start, head, q_slots.index(GROUP))


@gluon.jit
def _forward_kernel(
    queries, keys, values, outputs, V, Lse, indptr, indices, head_to_layout, valid,
    v_b, v_s, v_h, S, H, num_rows, depth, scale_log2,
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
    q_ready = open_barriers(CONSUMERS, 1)
    k_ring = open_ring(keys, SLOTS)
    v_ring = open_ring(values, SLOTS)
    turns = open_barriers(CONSUMERS, 1)
    fence_async_shared()
    barrier()
    mbarrier.arrive(turns.index(0))  # the first group starts

    base_v = V + batch.to(gl.int64) * v_b + head.to(gl.int64) * v_h
    lse_row = Lse + gl.program_id(1).to(gl.int64) * S
    CUT: gl.constexpr = valid is not None
    gl.warp_specialize(
        [
            (_consume, (
                outputs, lse_row, q_slots, q_ready, k_ring, v_ring, turns,
                tiles, rest, batch, head, start_m, S, scale_log2, 0, BN, D, RAGGED,
            )),
            (_consume, (
                outputs, lse_row, q_slots, q_ready, k_ring, v_ring, turns,
                tiles, rest, batch, head, start_m, S, scale_log2, 1, BN, D, RAGGED,
            )),
            (_produce, (
                queries, keys, values, base_v, v_s, q_slots, q_ready, k_ring, v_ring,
                indices, first, tiles, batch, head, start_m, end, BLOCK, BN, CUT,
            )),
        ],
        [WARPS, PRODUCER_WARPS],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    close_barriers(q_ready)
    close_ring(k_ring)
    close_ring(v_ring)
    close_barriers(turns)


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel; shapes and meanings are those of `block_sparse_attention`."""
    batch, tokens, heads, head_dim = q.shape
    num_rows = lists.row_indptr.shape[1] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    pipeline = HOPPER[head_dim].forward
    with torch.cuda.device_of(q):
        _forward_kernel[(num_rows, batch * heads)](
            tiles_of(q, ROWS.value), tiles_of(k, pipeline.tile), tiles_of(v, pipeline.tile),
            tiles_of(out, ROWS.value), v, lse,
            lists.row_indptr, lists.row_indices, lists.head_to_layout, lists.valid,
            *v.stride()[:3], tokens, heads, num_rows, num_rows.bit_length(), scale * LOG2_E.value,
            BLOCK=lists.block, BN=pipeline.tile, D=head_dim, SLOTS=pipeline.slots,
            RAGGED=lists.valid is not None or tokens % pipeline.tile != 0,
            REGISTERS=pipeline.registers, PRODUCER_REGISTERS=pipeline.producer_registers,
            num_warps=WARPS.value,
        )  # fmt: skip
    return out, lse
