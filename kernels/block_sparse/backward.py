"""Backward kernels: row sums, then dK and dV by columns of key blocks, then dQ by rows of queries.

Two passes over the kept blocks replace a fused one: each output tile is summed by one program in
list order, so gradients are deterministic and nothing is accumulated in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import LOG2_E
from .lists import Lists
from .tiles import keys_end, load_rows, own_start, store_rows, tile_start, visible_tiles
from .tuning import choose


@triton.jit
def _row_sums_kernel(
    Out, GradOut, Lse, GradLse, Scaled, Delta,
    do_b, do_s, do_h,
    S, H, padded, factor,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Store delta = rowsum(out * dOut) - dLse, and the log-sum-exp times `factor`.

    The log-sum-exp becomes +inf for rows that attend to nothing and for padding rows up to a whole
    block. Every probability recomputed from it is then 0, so the passes below need no mask over
    queries.
    """
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    m = start + tl.arange(0, ROWS)
    out_start = Out + (batch * S * H + head) * D
    out = load_rows(out_start, start, S, H * D, ROWS, D, False)
    do_start = GradOut + batch * do_b + head * do_h
    grad = load_rows(do_start, start, S, do_s, ROWS, D, False)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    lse = tl.load(Lse + row * S + m, mask=m < S, other=float("-inf"))
    if GradLse is not None:
        delta -= tl.load(GradLse + row * S + m, mask=m < S, other=0.0)
    sees = lse > float("-inf")
    tl.store(Delta + row * padded + m, tl.where(sees, delta, 0.0), mask=m < padded)
    tl.store(Scaled + row * padded + m, tl.where(sees, lse * factor, float("inf")), mask=m < padded)


def row_sums(
    out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, block: int, factor: float
) -> tuple[Tensor, Tensor]:
    """Return lse * factor and delta as fp32 [B, H, padded], padded to whole blocks.

    `_row_sums_kernel` defines both.
    """
    batch, tokens, heads, head_dim = out.shape
    padded = triton.cdiv(tokens, block) * block
    scaled, delta = torch.empty(2, batch, heads, padded, dtype=torch.float32, device=out.device)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    rows = min(block, 64)
    with torch.cuda.device_of(out):
        _row_sums_kernel[(padded // rows, batch * heads)](
            out, grad_out, lse, grad_lse, scaled, delta, *grad_out.stride()[:3],
            tokens, heads, padded, factor, ROWS=rows, D=head_dim, num_warps=4,
        )  # fmt: skip
    return scaled, delta


@triton.jit
def _grad_kv_kernel(
    Q, K, V, GradOut, GradK, GradV, Lse2, Delta, indptr, indices, head_to_layout, valid,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    S, H, num_columns, padded, scale, scale_log2,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    start_n = own_start(BLOCK, BN)
    column = tl.load(head_to_layout + head) * (num_columns + 1) + start_n // BLOCK
    first = tl.load(indptr + column)
    tiles = (tl.load(indptr + column + 1) - first) * (BLOCK // BM)
    end = keys_end(valid, batch, S)
    tiles = tl.where(start_n < end, tiles, 0)

    q_start = Q + batch * q_b + head * q_h
    do_start = GradOut + batch * do_b + head * do_h
    k = load_rows(K + batch * k_b + head * k_h, start_n, end, k_s, BN, D, False)  # [BN, D]
    v = load_rows(V + batch * v_b + head * v_h, start_n, end, v_s, BN, D, False)  # [BN, D]
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    sums = tl.program_id(1).to(tl.int64) * padded + tl.arange(0, BM)

    for i in tl.range(0, tiles, num_stages=STAGES):
        m = tile_start(indices, first, i, BLOCK, BM)
        q = load_rows(q_start, m, S, q_s, BM, D, False)  # [BM, D]
        lse2 = tl.load(Lse2 + sums + m)  # [BM]
        delta = tl.load(Delta + sums + m)  # [BM]
        s = tl.dot(k, q.T, input_precision="ieee")  # [BN, BM]
        do = load_rows(do_start, m, S, do_s, BM, D, False)  # [BM, D]
        dp = tl.dot(v, do.T, input_precision="ieee")  # [BN, BM]
        p = tl.math.exp2(s * scale_log2 - lse2[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    # A key affects only its own gradient row: rows past the end are zeroed here, not in the loop.
    counts = (start_n + tl.arange(0, BN) < end)[:, None]
    dk = tl.where(counts, dk * scale, 0.0).to(GradK.dtype.element_ty)
    dv = tl.where(counts, dv, 0.0).to(GradV.dtype.element_ty)
    offset = (batch * S * H + head) * D
    store_rows(GradK + offset, dk, start_n, S, H * D, BN, D)
    store_rows(GradV + offset, dv, start_n, S, H * D, BN, D)


@triton.jit
def _accumulate_dq(
    q, k, v, do, dq, lse2, delta, scale_log2, count, BN: tl.constexpr, MASK: tl.constexpr
):
    """Add one tile of keys to dq; `MASK` leaves out all but the first `count` keys."""
    s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BN]
    dp = tl.dot(do, v.T, input_precision="ieee")  # [BM, BN]
    p = tl.math.exp2(s * scale_log2 - lse2[:, None])
    if MASK:
        p = tl.where(tl.arange(0, BN)[None, :] < count, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _grad_q_kernel(
    Q, K, V, GradOut, GradQ, Lse2, Delta, indptr, indices, head_to_layout, valid,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    S, H, num_rows, padded, depth, scale, scale_log2,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    RAGGED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    start_m = own_start(BLOCK, BM)
    row = tl.load(head_to_layout + head) * (num_rows + 1) + start_m // BLOCK
    first = tl.load(indptr + row)
    stop = tl.load(indptr + row + 1)
    end = keys_end(valid, batch, S)
    whole, rest = visible_tiles(indices, first, stop, end, valid, depth, BLOCK, BN)

    q_start = Q + batch * q_b + head * q_h
    do_start = GradOut + batch * do_b + head * do_h
    k_start = K + batch * k_b + head * k_h
    v_start = V + batch * v_b + head * v_h
    q = load_rows(q_start, start_m, S, q_s, BM, D, False)  # [BM, D]
    do = load_rows(do_start, start_m, S, do_s, BM, D, False)  # [BM, D]
    sums = tl.program_id(1).to(tl.int64) * padded + start_m + tl.arange(0, BM)
    lse2 = tl.load(Lse2 + sums)  # [BM]
    delta = tl.load(Delta + sums)  # [BM]
    dq = tl.zeros([BM, D], tl.float32)

    # The last tile is peeled off, as in the forward kernel.
    for i in tl.range(0, whole, num_stages=STAGES):
        n = tile_start(indices, first, i, BLOCK, BN)
        k = load_rows(k_start, n, end, k_s, BN, D, True)
        v = load_rows(v_start, n, end, v_s, BN, D, True)
        dq = _accumulate_dq(q, k, v, do, dq, lse2, delta, scale_log2, rest, BN, False)
    if RAGGED:  # noqa: SIM102 - the outer choice is made at compile time
        if rest > 0:
            n = tile_start(indices, first, whole, BLOCK, BN)
            k = load_rows(k_start, n, end, k_s, BN, D, False)
            v = load_rows(v_start, n, end, v_s, BN, D, False)
            dq = _accumulate_dq(q, k, v, do, dq, lse2, delta, scale_log2, rest, BN, True)

    dq = (dq * scale).to(GradQ.dtype.element_ty)
    store_rows(GradQ + (batch * S * H + head) * D, dq, start_m, S, H * D, BM, D)


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
    lse2, delta = row_sums(out, grad_out, lse, grad_lse, lists.block, LOG2_E.value)
    tiles = choose(q.device, head_dim, q.element_size(), lists.block)
    strides = [s for x in (q, k, v, grad_out) for s in x.stride()[:3]]
    scales = scale, scale * LOG2_E.value
    with torch.cuda.device_of(q):
        tile = tiles.grad_kv
        _grad_kv_kernel[(triton.cdiv(tokens, tile.kv), batch * heads)](
            q, k, v, grad_out, dk, dv, lse2, delta,
            lists.col_indptr, lists.col_indices, lists.head_to_layout, lists.valid,
            *strides, tokens, heads, num_blocks, padded, *scales,
            BLOCK=lists.block, BM=tile.q, BN=tile.kv, D=head_dim,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = tiles.grad_q
        _grad_q_kernel[(triton.cdiv(tokens, tile.q), batch * heads)](
            q, k, v, grad_out, dq, lse2, delta,
            lists.row_indptr, lists.row_indices, lists.head_to_layout, lists.valid,
            *strides, tokens, heads, num_blocks, padded, num_blocks.bit_length(), *scales,
            BLOCK=lists.block, BM=tile.q, BN=tile.kv, D=head_dim,
            RAGGED=lists.valid is not None or tokens % tile.kv != 0, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dq, dk, dv
