"""The Triton kernels: one program per token, with all of its channels in registers.

They are memory-bound: each reads its inputs once and writes its result once, and the norm's
backward pass recomputes the statistics. Products and sums are not fused into multiply-adds, so
that they round as separate PyTorch operations do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_THREAD = 16  # channels per thread


@triton.jit
def _row(base, stride_b, stride_s):
    """Return a pointer to the first channel of this program's token, by 64-bit offsets."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    return base + sample * stride_b + token * stride_s


@triton.jit
def _load(base, stride_b, stride_s, C, BLOCK: tl.constexpr):
    """Load this token's channels in fp32, 0 past the last."""
    c = tl.arange(0, BLOCK)
    return tl.load(_row(base, stride_b, stride_s) + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _store(base, value, stride_b, stride_s, C, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    tl.store(_row(base, stride_b, stride_s) + c, value.to(base.dtype.element_ty), mask=c < C)


@triton.jit
def _normed(x, C, eps, BLOCK: tl.constexpr, LAYER: tl.constexpr):
    """Return x, less its mean if LAYER, over its root mean square, and one over the latter."""
    if LAYER:
        inside = tl.arange(0, BLOCK) < C
        for _ in tl.static_range(2):  # the second pass removes what rounding left of the mean
            x = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    return x * inverse, inverse


@triton.jit
def _norm_kernel(
    X, Scale, Shift, Out,
    x_b, x_s, scale_b, shift_b, o_b, o_s, C, eps,
    BLOCK: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    x, _ = _normed(_load(X, x_b, x_s, C, BLOCK), C, eps, BLOCK, LAYER)
    if Scale is not None:
        x = x * _load(Scale, scale_b, 0, C, BLOCK)
    if Shift is not None:
        x = x + _load(Shift, shift_b, 0, C, BLOCK)
    _store(Out, x, o_b, o_s, C, BLOCK)


@triton.jit
def _norm_backward_kernel(
    GradOut, X, Scale, GradX,
    o_b, o_s, x_b, x_s, scale_b, g_b, g_s, C, eps,
    BLOCK: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    grad = _load(GradOut, o_b, o_s, C, BLOCK)
    if Scale is not None:
        grad = grad * _load(Scale, scale_b, 0, C, BLOCK)
    x, inverse = _normed(_load(X, x_b, x_s, C, BLOCK), C, eps, BLOCK, LAYER)
    along = tl.sum(grad * x, 0) / C
    if LAYER:
        grad = grad - tl.sum(grad, 0) / C
    _store(GradX, inverse * (grad - x * along), g_b, g_s, C, BLOCK)


@triton.jit
def _gate_kernel(
    X, Y, Gate, Out, x_b, x_s, y_b, y_s, gate_b, o_b, o_s, C, BLOCK: tl.constexpr
):  # fmt: skip
    out = _load(Y, y_b, y_s, C, BLOCK) * _load(Gate, gate_b, 0, C, BLOCK)
    if X is not None:
        out = _load(X, x_b, x_s, C, BLOCK) + out
    _store(Out, out, o_b, o_s, C, BLOCK)


def norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, layer: bool, eps: float) -> Tensor:
    """Launch the norm of x [B, S, C] with scale and shift [B or 1, C]."""
    out = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _norm_kernel[_grid(x)](
            x, scale, shift, out,
            *x.stride()[:2], _sample_stride(scale), _sample_stride(shift), *out.stride()[:2],
            x.shape[2], eps, LAYER=layer, **_launch(x),
        )  # fmt: skip
    return out


def norm_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor | None, layer: bool, eps: float
) -> Tensor:
    """Launch the kernel for the gradient of x."""
    grad_x = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _norm_backward_kernel[_grid(x)](
            grad_out, x, scale, grad_x,
            *grad_out.stride()[:2], *x.stride()[:2], _sample_stride(scale), *grad_x.stride()[:2],
            x.shape[2], eps, LAYER=layer, **_launch(x),
        )  # fmt: skip
    return grad_x


def gate(x: Tensor | None, y: Tensor, by: Tensor) -> Tensor:
    """Launch x + y * by, or y * by if x is None; x, y are [B, S, C] and by is [B or 1, C]."""
    out = y.new_empty(y.shape)
    with torch.cuda.device_of(y):
        _gate_kernel[_grid(y)](
            x, y, by, out,
            *((0, 0) if x is None else x.stride()[:2]), *y.stride()[:2], _sample_stride(by),
            *out.stride()[:2], y.shape[2], **_launch(y),
        )  # fmt: skip
    return out


def _sample_stride(modulation: Tensor | None) -> int:
    """Return the stride between samples; 0 if all of them share one row."""
    return 0 if modulation is None or len(modulation) == 1 else modulation.stride(0)


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[0]


def _launch(x: Tensor) -> dict:
    block = triton.next_power_of_2(x.shape[2])
    return {"BLOCK": block, "num_warps": warps_for(block), "enable_fp_fusion": False}


def warps_for(block: int) -> int:
    """Return the number of warps for a program of `block` channels."""
    return min(max(block // (32 * PER_THREAD), 1), 16)
