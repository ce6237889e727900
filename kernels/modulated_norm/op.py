"""`modulated_norm` and `gated_add`: checks, choice of backend, custom ops with their gradients."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ..backend import FusedBackend, contiguous_rows, resolve_fused
from . import reference

Norm = Literal["rms", "layer"]
NORMS: tuple[str, ...] = get_args(Norm)
MOST_CHANNELS = 16384  # the most that one program can hold


def modulated_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: Norm,
    eps: float,
    backend: FusedBackend = "auto",
) -> Tensor:
    """Compute norm(x) * scale + shift over channels in fp32, rounded once.

    This is the adaptive norm of Peebles and Xie 2023 ("Scalable diffusion models with
    transformers", section 3.2). `scale` is the whole factor, often 1 + a predicted value.

    Args:
        x: [B, S, C] bf16, fp16 or fp32 (`reference`: fp64 too), C at most 16384; any strides, and
            copied if C is not contiguous.
        scale, shift: [C], [B, C] or [B, 1, C], where B may be 1, of any floating type; None for
            a scale of 1 and a shift of 0.
        norm: "rms" divides by the root mean square; "layer" subtracts the mean first.
        eps: added to the mean square.
        backend: "auto" is "triton" on NVIDIA GPUs where scale and shift need no gradient, else
            "reference".

    Returns:
        [B, S, C], contiguous, in x's dtype. It is differentiable once in x; with `reference`, in
        all inputs.

    Raises:
        ValueError: if an argument is wrong; the message names it, its value and the remedy.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    x = _checked("x", x)
    scale, shift = (_rows(n, m, x) for n, m in (("scale", scale), ("shift", shift)))
    if resolve_fused(backend, x, {"scale": scale, "shift": shift}) == "reference":
        return reference.modulated_norm(x, scale, shift, norm == "layer", eps)
    return _modulated_norm(x, scale, shift, norm == "layer", eps)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, *, backend: FusedBackend = "auto") -> Tensor:
    """Compute x + y * gate in fp32, rounded once.

    Args:
        x, y: [B, S, C] of one dtype, as x in `modulated_norm`.
        gate: as scale in `modulated_norm`.
        backend: "auto" is "triton" on NVIDIA GPUs if gate needs no gradient, else "reference".

    Returns:
        [B, S, C], contiguous, in x's dtype. It is differentiable once in x and y; with
        `reference`, in all inputs.

    Raises:
        ValueError: if an argument is wrong; the message names it, its value and the remedy.
    """
    x, y = _checked("x", x), _checked("y", y)
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}, y {tuple(y.shape)} {y.dtype} on "
            f"{y.device}; they must be alike"
        )
    rows = _rows("gate", gate, x)
    assert rows is not None
    if resolve_fused(backend, x, {"gate": rows}) == "reference":
        return reference.gated_add(x, y, rows)
    return _gated_add(x, y, rows)


def _checked(name: str, x: Tensor) -> Tensor:
    if x.ndim != 3 or 0 in x.shape or x.shape[2] > MOST_CHANNELS:
        raise ValueError(
            f"{name} must be [B, S, C], not empty and of at most {MOST_CHANNELS} channels; got "
            f"{tuple(x.shape)}"
        )
    return contiguous_rows(x)


def _rows(name: str, modulation: Tensor | None, x: Tensor) -> Tensor | None:
    """Check a scale, shift or gate, and return it as [B or 1, C], contiguous in C."""
    if modulation is None:
        return None
    batch, _, channels = x.shape
    if not (_fits(modulation, batch, channels) and modulation.is_floating_point()):
        raise ValueError(
            f"{name} must be [{channels}], [{batch}, {channels}] or [{batch}, 1, {channels}], or "
            f"1 in place of {batch}, and floating; got {tuple(modulation.shape)} {modulation.dtype}"
        )
    if modulation.device != x.device:
        raise ValueError(f"{name} is on {modulation.device}, x on {x.device}; move it")
    return contiguous_rows(modulation.reshape(-1, channels))


def _fits(modulation: Tensor, batch: int, channels: int) -> bool:
    """Return whether the shape is [C], [B or 1, C] or [B or 1, 1, C].

    Sizes are compared one by one: looked up in a tuple of lists, the same sizes are not found under
    torch.compile of torch 2.11.
    """
    if modulation.ndim not in (1, 2, 3) or modulation.shape[-1] != channels:
        return False
    rows = modulation.shape[0] if modulation.ndim > 1 else 1
    return rows in (1, batch) and (modulation.ndim < 3 or modulation.shape[1] == 1)


@torch.library.custom_op("longreel::modulated_norm", mutates_args=())
def _modulated_norm(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, layer: bool, eps: float
) -> Tensor:
    from .kernel import norm

    return norm(x, scale, shift, layer, eps)


@_modulated_norm.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@torch.library.custom_op("longreel::modulated_norm_backward", mutates_args=())
def _modulated_norm_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor | None, layer: bool, eps: float
) -> Tensor:
    from .kernel import norm_backward

    return norm_backward(contiguous_rows(grad_out), x, scale, layer, eps)


@_modulated_norm_backward.register_fake
def _(grad_out, x, *_):
    return x.new_empty(x.shape)


def _save_norm(ctx, inputs, output) -> None:
    x, scale, _, ctx.layer, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _differentiate_norm(ctx, grad_out: Tensor):
    x, scale = ctx.saved_tensors
    return _modulated_norm_backward(grad_out, x, scale, ctx.layer, ctx.eps), *(None,) * 4


_modulated_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)


@torch.library.custom_op("longreel::gated_add", mutates_args=())
def _gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    from .kernel import gate as launch

    return launch(x, y, gate)


@_gated_add.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@torch.library.custom_op("longreel::gated_add_backward", mutates_args=())
def _gated_add_backward(grad_out: Tensor, gate: Tensor) -> Tensor:
    from .kernel import gate as launch

    return launch(None, contiguous_rows(grad_out), gate)


@_gated_add_backward.register_fake
def _(grad_out, _):
    return grad_out.new_empty(grad_out.shape)


def _save_gate(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _differentiate_gate(ctx, grad_out: Tensor):
    (gate,) = ctx.saved_tensors
    grad_y = _gated_add_backward(grad_out, gate) if ctx.needs_input_grad[1] else None
    return grad_out, grad_y, None


_gated_add.register_autograd(_differentiate_gate, setup_context=_save_gate)
