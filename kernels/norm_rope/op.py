"""`norm_rope`: checks, choice of backend, and the custom op with its gradient."""

import torch
from torch import Tensor

from ..backend import FusedBackend, contiguous_rows, resolve_fused
from . import reference

HEAD_DIMS = (16, 32, 64, 128)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    across_heads: bool = False,
    round_before_weight: bool = False,
    text: Tensor | None = None,
    text_weight: Tensor | None = None,
    backend: FusedBackend = "auto",
) -> Tensor:
    """Apply RMS norm to queries or keys, then rotary position embedding to the first tokens.

    Statistics and rotation are fp32. As in the modules of diffusers, the norm's result is rounded
    to x's dtype before the rotation, and the rotation's result again. RMS norm: Zhang and Sennrich,
    2019; rotary embedding: Su et al., 2021, on pairs of neighbouring channels.

    Args:
        x: [B, S, H, D] bf16, fp16 or fp32 (`reference`: fp64 too), D in {16, 32, 64, 128}; any
            strides with contiguous D.
        weight: weight of the norm, [D], or [H * D] across heads, in x's dtype; None for none.
        cos, sin: [V, D / 2], or [V, H, D / 2] if frequencies differ by head, fp32, any strides.
            The first V <= S tokens are rotated; the others are only normalised.
        eps: added to the mean square.
        across_heads: True takes one mean square over all heads of a token, not one per head.
        round_before_weight: True also rounds to x's dtype before multiplying by the weight, as the
            `RMSNorm` of diffusers does; `torch.nn.RMSNorm` and `MochiRMSNorm` do not.
        text: [B, T, H, D], tokens that follow x's in the result and are only normalised.
        text_weight: weight of the norm of `text`.
        backend: "auto" is "triton" on NVIDIA GPUs where weights and tables need no gradient, else
            "reference".

    Returns:
        [B, S + T, H, D], contiguous, in x's dtype. It is differentiable once in x and text; with
        `reference`, any number of times and in all inputs.

    Raises:
        ValueError: if an argument is wrong; the message names it, its value and the remedy.
    """
    _check(x, weight, cos, sin, across_heads)
    if text is not None:
        _check_text(x, text, text_weight, across_heads)
    options = (eps, across_heads, round_before_weight)
    constants = {"weight": weight, "text_weight": text_weight, "cos": cos, "sin": sin}
    if resolve_fused(backend, x, constants) == "reference":
        return reference.norm_rope(x, weight, cos, sin, text, text_weight, *options)
    return _norm_rope(x, weight, cos, sin, text, text_weight, *options)


def _check(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, across_heads: bool) -> None:
    if x.ndim != 4 or 0 in x.shape or x.stride(3) != 1:
        raise ValueError(
            f"x must be [B, S, H, D], not empty and contiguous in D; got {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    _, tokens, heads, head_dim = x.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}; it must be one of {HEAD_DIMS}")
    _check_weight("weight", weight, x, across_heads)
    per_head = (heads,) if cos.ndim == 3 else ()
    if cos.shape != sin.shape or cos.shape[1:] != (*per_head, head_dim // 2) or len(cos) > tokens:
        raise ValueError(
            f"cos and sin must both be [V, {head_dim // 2}] or [V, {heads}, {head_dim // 2}] with "
            f"V at most {tokens}; got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != wide or table.device != x.device:
            raise ValueError(
                f"{name} is {table.dtype} on {table.device}; it must be {wide} on {x.device}"
            )


def _check_text(x: Tensor, text: Tensor, weight: Tensor | None, across_heads: bool) -> None:
    batch, _, heads, head_dim = x.shape
    fits = text.ndim == 4 and text.shape == (batch, text.shape[1], heads, head_dim)
    if not fits or 0 in text.shape or text.stride(3) != 1:
        raise ValueError(
            f"text must be [{batch}, T, {heads}, {head_dim}], not empty and contiguous in its last "
            f"dimension; got {tuple(text.shape)}"
        )
    if text.dtype != x.dtype or text.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, text {text.dtype} on {text.device}; move it"
        )
    _check_weight("text_weight", weight, x, across_heads)


def _check_weight(name: str, weight: Tensor | None, x: Tensor, across_heads: bool) -> None:
    if weight is None:
        return
    size = x.shape[3] * (x.shape[2] if across_heads else 1)
    if weight.shape != (size,) or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"{name} is {tuple(weight.shape)} {weight.dtype} on {weight.device}; it must be "
            f"({size},) {x.dtype} on {x.device}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{name} is not contiguous (pass {name}.contiguous())")


@torch.library.custom_op("longreel::norm_rope", mutates_args=())
def _norm_rope(
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
    from .kernel import forward

    return forward(x, weight, cos, sin, text, text_weight, eps, across_heads, round_before_weight)


@_norm_rope.register_fake
def _(x, weight, cos, sin, text, *_):
    batch, tokens, heads, head_dim = x.shape
    total = tokens + (0 if text is None else text.shape[1])
    return x.new_empty((batch, total, heads, head_dim))


@torch.library.custom_op("longreel::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    across_heads: bool,
) -> Tensor:
    from .kernel import backward

    return backward(contiguous_rows(grad_out), x, weight, cos, sin, eps, across_heads)


@_norm_rope_backward.register_fake
def _(grad_out, x, *_):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.across_heads, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_out: Tensor):
    x, weight, cos, sin, text, text_weight = ctx.saved_tensors
    options = (ctx.eps, ctx.across_heads)
    tokens = x.shape[1]
    grad_x = grad_text = None
    if ctx.needs_input_grad[0]:
        grad_x = _norm_rope_backward(grad_out[:, :tokens], x, weight, cos, sin, *options)
    if ctx.needs_input_grad[4]:
        grad_text = _norm_rope_backward(
            grad_out[:, tokens:], text, text_weight, None, None, *options
        )
    return grad_x, None, None, None, grad_text, *(None,) * 4


_norm_rope.register_autograd(_differentiate, setup_context=_save)
