"""`block_sparse_attention`: checks, choice of backend, and the custom op with its gradient."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ..backend import check_dtype, check_name, check_triton
from . import reference
from .lists import Lists
from .tuning import hopper_takes

Backend = Literal["auto", "triton", "flex", "fa4", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
HEAD_DIMS = (16, 32, 64, 128)
BLOCKS = (16, 32, 64, 128)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_indptr: Tensor,
    row_indices: Tensor,
    col_indptr: Tensor,
    col_indices: Tensor,
    head_to_layout: Tensor,
    *,
    block: int,
    valid: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T) v, where each query block attends to the key blocks it lists.

    All token pairs of a listed pair of blocks are attended, except keys at or past `valid` and the
    tail past the sequence. The function is differentiable once in q, k and v through both outputs.
    It is deterministic, except for gradients as `deterministic` says, and does not synchronise with
    the host. (On a GPU `reference` does, because it reads the lists, and so does `fa4` for new
    lists and shapes.) The algorithm is FlashAttention-2's (Dao, 2023), over block lists.

    Args:
        q, k, v: [B, S, H, D] bf16, fp16 or fp32 (`reference`: fp64 too), D in {16, 32, 64, 128};
            any strides with contiguous D, so views of a fused projection need no copy.
        row_indptr: [L, rows + 1] int32, rows = ceil(S / block). Block row r of layout l lists
            `row_indices[row_indptr[l, r] : row_indptr[l, r + 1]]`.
        row_indices: [nnz] int32, key blocks of all L layouts, ascending within a row.
        col_indptr, col_indices: the same pairs by key block: column c lists its query blocks.
        head_to_layout: [H] int32, the layout of each head.
        block: tokens per block: 16, 32, 64 or 128 (the fast one).
        valid: [B] int32 on the same device: keys at positions >= valid[b] are masked. Queries
            there are computed like any others.
        scale: positive factor of the logits; D ** -0.5 by default.
        deterministic: True if repeated gradients must be bit-equal; None follows
            torch.use_deterministic_algorithms. Otherwise `triton` on Hopper and `fa4` sum the
            gradient of q in no fixed order, which is faster.
        backend: "auto", "triton", "flex", "fa4" or "reference"; see `resolve_backend`.

    Returns:
        out [B, S, H, D], contiguous, in q's dtype; and the natural log-sum-exp of the scaled logits
        [B, H, S], fp32 (fp64 for fp64). A query that sees no key has out 0, lse -inf and zero
        gradients.

    Raises:
        ValueError: if an argument is wrong; the message names it, its value and the remedy.
        RuntimeError: if `fa4` is asked for and its results are wrong on this GPU.
    """
    lists = Lists(row_indptr, row_indices, col_indptr, col_indices, head_to_layout, valid, block)
    _check(q, k, v, lists)
    factor: float = q.shape[3] ** -0.5 if scale is None else scale
    if not factor > 0:
        raise ValueError(f"scale is {scale}; it must be positive (negate q for a negative one)")
    resolved = resolve_backend(backend, q.device, q.dtype, q.shape[3], block)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if resolved == "fa4":
        from . import fa4

        fa4.check_call(valid, gradients, deterministic)
    if resolved == "flex":
        if gradients and q.device.type == "cpu":
            raise ValueError("the flex backend has no backward on a CPU; use backend='reference'")
        from . import flex

        return flex.attention(q, k, v, lists, factor)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return _attention(q, k, v, *lists, factor, resolved, deterministic)


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, block: int = 128
) -> str:
    """Return the backend that `backend` means for such inputs; an explicit one never falls back.

    "auto" is "reference" on CPUs and "triton" everywhere else. The others run only when asked for:
    "flex" is PyTorch's FlexAttention on the same lists, an independent implementation to compare
    with; "fa4" is the package flash-attn-4, on Hopper.

    Raises:
        ValueError: if the backend is unknown or cannot compute such inputs here; the message says
            why, and what to use instead.
    """
    check_name(backend, BACKENDS)
    if backend == "auto":
        backend = "reference" if device.type == "cpu" else "triton"
    if backend == "fa4":
        from . import fa4

        fa4.check_inputs(device, dtype, head_dim, block)
    if backend != "reference":
        check_dtype(backend, dtype)
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}; it must be one of {HEAD_DIMS}")
    if backend == "triton":
        check_triton(device)
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, lists: Lists) -> None:
    """Raise ValueError for wrong shapes, dtypes or devices; contents are never read back."""
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or 0 in q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must all be [B, S, H, D] and not empty; got {shapes}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}; cast them")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(
                f"{name} has strides {x.stride()}; its last dimension must be contiguous "
                f"(pass {name}.contiguous())"
            )
    row_indptr, row_indices, col_indptr, col_indices, head_to_layout, valid, block = lists
    if block not in BLOCKS:
        raise ValueError(f"block is {block}; it must be one of {BLOCKS}")
    batch, tokens, heads, _ = q.shape
    rows = -(-tokens // block)
    for name, indptr in (("row_indptr", row_indptr), ("col_indptr", col_indptr)):
        if indptr.ndim != 2 or indptr.shape[1] != rows + 1:
            raise ValueError(
                f"{name} has shape {tuple(indptr.shape)}; {tokens} tokens in blocks of {block} "
                f"need [layouts, {rows + 1}]: build the layout for this sequence"
            )
    if row_indices.ndim != 1 or row_indices.shape != col_indices.shape:
        raise ValueError(
            "row_indices and col_indices must be flat and of one length; got "
            f"{tuple(row_indices.shape)} and {tuple(col_indices.shape)}"
        )
    if col_indptr.shape != row_indptr.shape:
        raise ValueError(
            f"row_indptr {tuple(row_indptr.shape)} and col_indptr {tuple(col_indptr.shape)} "
            "hold different numbers of layouts"
        )
    if head_to_layout.shape != (heads,):
        raise ValueError(
            f"head_to_layout has shape {tuple(head_to_layout.shape)}; q has {heads} heads"
        )
    if valid is not None and valid.shape != (batch,):
        raise ValueError(f"valid has shape {tuple(valid.shape)}; the batch is {batch}")
    for x in (x for x in lists if isinstance(x, Tensor)):
        if x.dtype != torch.int32 or x.device != q.device or not x.is_contiguous():
            raise ValueError(
                "the lists, head_to_layout and valid must be contiguous int32 tensors on q's "
                f"device ({q.device}); got one of {x.dtype} on {x.device}"
            )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k and v are on {q.device}, {k.device} and {v.device}; move them")


@torch.library.custom_op("longreel::block_sparse_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_indptr: Tensor,
    row_indices: Tensor,
    col_indptr: Tensor,
    col_indices: Tensor,
    head_to_layout: Tensor,
    valid: Tensor | None,
    block: int,
    scale: float,
    backend: str,
    deterministic: bool,  # of the gradients
) -> tuple[Tensor, Tensor]:
    lists = Lists(row_indptr, row_indices, col_indptr, col_indices, head_to_layout, valid, block)
    if backend == "reference":
        return reference.forward(q, k, v, lists, scale)
    if backend == "fa4":
        from .fa4 import check_results, forward

        # Here, inside the op, tensors are real also under torch.compile.
        check_results(q, row_indptr)
    elif hopper_takes(block, q, k, v):
        from .hopper_forward import forward
    else:
        from .forward import forward

    return forward(q, k, v, lists, scale)


@_attention.register_fake
def _(q, k, v, row_indptr, row_indices, col_indptr, col_indices, head_to_layout, *_):
    batch, tokens, heads, _ = q.shape
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=statistics)


@torch.library.custom_op("longreel::block_sparse_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_indptr: Tensor,
    row_indices: Tensor,
    col_indptr: Tensor,
    col_indices: Tensor,
    head_to_layout: Tensor,
    valid: Tensor | None,
    block: int,
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # The gradient of a sum arrives expanded, with strides of 0, from which no tile can be copied.
    if grad_out.stride(3) != 1 or 0 in grad_out.stride():
        grad_out = grad_out.contiguous()
    lists = Lists(row_indptr, row_indices, col_indptr, col_indices, head_to_layout, valid, block)
    arguments = (grad_out, grad_lse, q, k, v, out, lse, lists, scale)
    if backend == "reference":
        return reference.backward(*arguments)
    if backend == "fa4":
        from .fa4 import backward, check_results

        check_results(q, row_indptr)
    elif hopper_takes(block, q, k, v, grad_out):
        if deterministic:
            from .hopper_backward import backward
        else:
            from .hopper_fused import backward
    else:
        from .backward import backward

    return backward(*arguments)


@_attention_backward.register_fake
def _(grad_out, grad_lse, q, *_):
    return tuple(q.new_empty(q.shape) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.block, ctx.scale, ctx.backend, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    q, k, v, *lists, valid, out, lse = ctx.saved_tensors
    unused = (None,) * 10
    if grad_out is None:
        if grad_lse is None:
            return None, None, None, *unused
        grad_out = torch.zeros_like(out)
    settings = ctx.block, ctx.scale, ctx.backend, ctx.deterministic
    grads = _attention_backward(grad_out, grad_lse, q, k, v, out, lse, *lists, valid, *settings)
    return *grads, *unused


_attention.register_autograd(_differentiate, setup_context=_save)

# The operator under the name by which dispatch modes and `torch.compile` see it.
OPERATOR = torch.ops.longreel.block_sparse_attention.default
