"""Forward kernel: softmax(scale * q k^T) v over listed key blocks, one program per query tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lists import Lists
from .tiles import keys_end, load_rows, own_start, store_rows, tile_start, visible_tiles
from .tuning import choose

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _accumulate(q, k, v, acc, top, total, scale_log2, count, BN: tl.constexpr, MASK: tl.constexpr):
    """Do one online-softmax step; `MASK` leaves out all but the first `count` keys of the tile."""
    s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BN]
    if MASK:
        s = tl.where(tl.arange(0, BN)[None, :] < count, s, float("-inf"))
    # Every tile holds an unmasked key, so `higher` is finite and no exponent is inf - inf.
    higher = tl.maximum(top, tl.max(s, 1) * scale_log2)
    p = tl.math.exp2(s * scale_log2 - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def _forward_kernel(
    Q, K, V, Out, Lse, indptr, indices, head_to_layout, valid,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    S, H, num_rows, depth, scale_log2,
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
    k_start = K + batch * k_b + head * k_h
    v_start = V + batch * v_b + head * v_h
    q = load_rows(q_start, start_m, S, q_s, BM, D, False)  # [BM, D]
    acc = tl.zeros([BM, D], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)

    # Only the last tile can need a mask: it is peeled off the loop.
    for i in tl.range(0, whole, num_stages=STAGES):
        n = tile_start(indices, first, i, BLOCK, BN)
        k = load_rows(k_start, n, end, k_s, BN, D, True)
        v = load_rows(v_start, n, end, v_s, BN, D, True)
        acc, top, total = _accumulate(q, k, v, acc, top, total, scale_log2, rest, BN, False)
    if RAGGED:  # noqa: SIM102 - the outer choice is made at compile time
        if rest > 0:
            n = tile_start(indices, first, whole, BLOCK, BN)
            k = load_rows(k_start, n, end, k_s, BN, D, False)
            v = load_rows(v_start, n, end, v_s, BN, D, False)
            acc, top, total = _accumulate(q, k, v, acc, top, total, scale_log2, rest, BN, True)

    # A row that sees no key: 0 / 1 = 0, and top = -inf makes its log-sum-exp -inf.
    total = tl.where(total > 0, total, 1.0)
    lse = (top + tl.math.log2(total)) * LN_2
    m = start_m + tl.arange(0, BM)
    tl.store(Lse + tl.program_id(1).to(tl.int64) * S + m, lse, mask=m < S)
    out = (acc / total[:, None]).to(Out.dtype.element_ty)
    store_rows(Out + (batch * S * H + head) * D, out, start_m, S, H * D, BM, D)


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel; shapes and meanings are those of `block_sparse_attention`."""
    batch, tokens, heads, head_dim = q.shape
    num_rows = lists.row_indptr.shape[1] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    tile = choose(q.device, head_dim, q.element_size(), lists.block).forward
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(tokens, tile.q), batch * heads)](
            q, k, v, out, lse,
            lists.row_indptr, lists.row_indices, lists.head_to_layout, lists.valid,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            tokens, heads, num_rows, num_rows.bit_length(), scale * LOG2_E.value,
            BLOCK=lists.block, BM=tile.q, BN=tile.kv, D=head_dim,
            RAGGED=lists.valid is not None or tokens % tile.kv != 0, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse
