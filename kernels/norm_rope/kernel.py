"""The Triton kernels: a program handles a few rows of `head_dim`, each one head of one token.

Both are memory-bound: the forward pass reads x and writes the result once; the backward pass reads
x and the gradient, recomputes the statistics and writes the gradient of x. Products and sums are
not fused into multiply-adds, so that they round as separate PyTorch operations do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # rows per program for a norm per head; a norm across heads takes a token's heads
ROWS_OF_WARP = 4  # rows per warp: 16 elements per thread at head_dim 128; at 8 rows registers spill


@triton.jit
def _places(S, H, ROWS: tl.constexpr, ACROSS: tl.constexpr):
    """Return the token and head of each of the program's rows, 64-bit, and which rows exist."""
    if ACROSS:
        head = tl.arange(0, ROWS)
        token = tl.zeros([ROWS], tl.int32) + tl.program_id(0)
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token, head = row // H, row % H
    return token.to(tl.int64), head.to(tl.int64), (token < S) & (head < H)


@triton.jit
def _pointers(base, token, head, stride_b, stride_s, stride_h, D: tl.constexpr):
    rows = tl.program_id(1).to(tl.int64) * stride_b + token * stride_s + head * stride_h
    return base + rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _load_weight(Weight, head, inside, D: tl.constexpr, ACROSS: tl.constexpr):
    """Load the norm's weight as fp32 [ROWS or 1, D]."""
    d = tl.arange(0, D)[None, :]
    if ACROSS:
        weight = tl.load(Weight + head[:, None] * D + d, mask=inside[:, None], other=0.0)
    else:
        weight = tl.load(Weight + d)
    return weight.to(tl.float32)


@triton.jit
def _load_tables(
    Cos, Sin, token, head, inside, rotated, t_s, t_h, t_d, D: tl.constexpr
):  # fmt: skip
    """Load cos and sin [ROWS, D / 2]; 1 and 0 for tokens that are not rotated."""
    mask = (inside & (token < rotated))[:, None]
    places = (token * t_s + head * t_h)[:, None] + tl.arange(0, D // 2)[None, :] * t_d
    return tl.load(Cos + places, mask=mask, other=1.0), tl.load(Sin + places, mask=mask, other=0.0)


@triton.jit
def _mean(x, H, D: tl.constexpr, ACROSS: tl.constexpr):
    """Return the mean of x [ROWS, D] over D, [ROWS, 1], or over all H heads, a scalar."""
    if ACROSS:
        return tl.sum(tl.sum(x, 1), 0) / (H * D)
    else:
        return tl.sum(x, 1)[:, None] / D


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [ROWS, D])


@triton.jit
def _forward_kernel(
    X, Weight, Cos, Sin, Out,
    x_b, x_s, x_h, t_s, t_h, t_d, o_b, o_s, o_h,
    S, H, rotated, eps,
    ROWS: tl.constexpr, D: tl.constexpr, ACROSS: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    token, head, inside = _places(S, H, ROWS, ACROSS)
    dtype: tl.constexpr = Out.dtype.element_ty
    x = tl.load(_pointers(X, token, head, x_b, x_s, x_h, D), mask=inside[:, None], other=0.0)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(_mean(x * x, H, D, ACROSS) + eps)
    if Weight is not None:
        if ROUND_FIRST:
            x = x.to(dtype).to(tl.float32)
        x = x * _load_weight(Weight, head, inside, D, ACROSS)
    if Cos is not None:
        cos, sin = _load_tables(Cos, Sin, token, head, inside, rotated, t_s, t_h, t_d, D)
        x = _rotate(x.to(dtype).to(tl.float32), cos, sin, ROWS, D)
    tl.store(_pointers(Out, token, head, o_b, o_s, o_h, D), x.to(dtype), mask=inside[:, None])


@triton.jit
def _backward_kernel(
    GradOut, X, Weight, Cos, Sin, GradX,
    o_b, o_s, o_h, x_b, x_s, x_h, t_s, t_h, t_d, g_b, g_s, g_h,
    S, H, rotated, eps,
    ROWS: tl.constexpr, D: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    token, head, inside = _places(S, H, ROWS, ACROSS)
    mask = inside[:, None]
    grad = tl.load(_pointers(GradOut, token, head, o_b, o_s, o_h, D), mask=mask, other=0.0)
    grad = grad.to(tl.float32)
    if Cos is not None:
        cos, sin = _load_tables(Cos, Sin, token, head, inside, rotated, t_s, t_h, t_d, D)
        grad = _rotate(grad, cos, -sin, ROWS, D)
    if Weight is not None:
        grad = grad * _load_weight(Weight, head, inside, D, ACROSS)
    x = tl.load(_pointers(X, token, head, x_b, x_s, x_h, D), mask=mask, other=0.0)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(_mean(x * x, H, D, ACROSS) + eps)
    x = x * inverse
    grad = inverse * (grad - x * _mean(grad * x, H, D, ACROSS))
    grad_x = grad.to(GradX.dtype.element_ty)
    tl.store(_pointers(GradX, token, head, g_b, g_s, g_h, D), grad_x, mask=mask)


def forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    text: Tensor | None,
    text_weight: Tensor | None,
    eps: float,
    across_heads: bool,
    round_before_weight: bool,
) -> Tensor:
    """Launch for x, and for text into the rows after it; shapes are those of `op.norm_rope`."""
    batch, tokens, heads, head_dim = x.shape
    total = tokens + (0 if text is None else text.shape[1])
    out = x.new_empty(batch, total, heads, head_dim)
    parts = [(x, weight, cos, sin, out[:, :tokens])]
    if text is not None:
        parts.append((text, text_weight, None, None, out[:, tokens:]))
    for part, own_weight, own_cos, own_sin, target in parts:
        tables, strides, rotated = _tables(own_cos, own_sin)
        with torch.cuda.device_of(x):
            _forward_kernel[_grid(part, across_heads)](
                part, own_weight, *tables, target,
                *part.stride()[:3], *strides, *target.stride()[:3],
                part.shape[1], heads, rotated, eps,
                ROUND_FIRST=round_before_weight, **_launch(part, across_heads),
            )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    across_heads: bool,
) -> Tensor:
    """Launch for the gradient of x, or of text, which has no tables.

    grad_out holds only the rows of that input.
    """
    grad_x = x.new_empty(x.shape)
    tables, strides, rotated = _tables(cos, sin)
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(x, across_heads)](
            grad_out, x, weight, *tables, grad_x,
            *grad_out.stride()[:3], *x.stride()[:3], *strides, *grad_x.stride()[:3],
            x.shape[1], x.shape[2], rotated, eps, **_launch(x, across_heads),
        )  # fmt: skip
    return grad_x


def _tables(cos: Tensor | None, sin: Tensor | None):
    """Return both tables, their common strides by token, head and pair, and their token count."""
    if cos is None or sin is None:
        return (None, None), (0, 0, 0), 0
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    by_token, *by_head, by_pair = cos.stride()
    return (cos, sin), (by_token, *(by_head or [0]), by_pair), len(cos)


def _grid(x: Tensor, across_heads: bool) -> tuple[int, int]:
    batch, tokens, heads, _ = x.shape
    return tokens if across_heads else triton.cdiv(tokens * heads, ROWS), batch


def _launch(x: Tensor, across_heads: bool) -> dict:
    rows = triton.next_power_of_2(x.shape[2]) if across_heads else ROWS
    return {
        "ROWS": rows,
        "D": x.shape[3],
        "ACROSS": across_heads,
        "num_warps": max(rows // ROWS_OF_WARP, 1),
        "enable_fp_fusion": False,
    }
