"""Block-sparse attention by flash-attn-4's kernels, on Hopper; runs only when asked for by name.

flash-attn-4 (`flash_attn.cute`, BSD-3) is a separate package, in beta, that compiles kernels when
they are first called. Its backward computes dK, dV and dQ in one pass and sums dQ in memory in no
fixed order, so repeated gradients are not bit-equal. Its block-sparse gradients on Hopper were
once silently wrong, at head_dim 64 (Dao-AILab/flash-attention#2623), so `check_results` compares
it with our oracle before it computes anything for a caller.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cache import PerTensor
from .lists import Lists
from .selfcheck import find_fault

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
BLOCK = 128
CAPABILITY = (9, 0)
REMEDY = "use backend='triton'"
# Tokens of the problem that the self-check solves. For longer sequences flash-attn-4 compiles no
# other kernels.
CHECKED_TOKENS = 16 * BLOCK


def check_inputs(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> None:
    """Raise ValueError unless flash-attn-4 is installed and computes such inputs."""
    if dtype not in DTYPES:
        raise ValueError(
            f"the fa4 backend computes in bfloat16 and float16, and q is {dtype}; {REMEDY}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the fa4 backend takes head_dim 64 or 128, not {head_dim}; {REMEDY}")
    if block != BLOCK:
        raise ValueError(f"the fa4 backend takes block=128, not {block}; {REMEDY}")
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError("the fa4 backend needs an NVIDIA GPU; use backend='reference'")
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        # On Blackwell its forward takes 256 queries a block; before Hopper it has no backward.
        raise ValueError(
            "the fa4 backend needs compute capability 9.0 (Hopper), and this GPU has "
            f"{capability[0]}.{capability[1]}; {REMEDY}"
        )
    if failure := _import_failure():
        raise ValueError(
            f"the fa4 backend needs flash-attn-4, and loading it failed ({failure}): "
            f"pip install 'longreel[fa4]', or {REMEDY}"
        )


def check_call(valid: Tensor | None, gradients: bool, deterministic: bool | None) -> None:
    """Raise ValueError for options of a call that flash-attn-4 has no kernel for."""
    if valid is not None:
        raise ValueError(
            "the fa4 backend takes no valid: its backward does not support sample lengths; cut the "
            f"padding off and pass valid=None, or {REMEDY}"
        )
    if deterministic is None:
        deterministic = _strictly_deterministic()
    if gradients and deterministic:
        raise ValueError(
            "the fa4 backend's gradients are not deterministic, which deterministic=True or "
            f"torch.use_deterministic_algorithms(True) asks for; {REMEDY}"
        )


@torch.compiler.assume_constant_result  # torch.compile cannot trace this
def _strictly_deterministic() -> bool:
    return torch.get_deterministic_debug_mode() == 2  # an error, not a warning


def check_results(q: Tensor, row_indptr: Tensor) -> None:
    """Raise RuntimeError if flash-attn-4's results for such inputs are wrong on this GPU.

    Each kind of call, one for which it compiles another kernel or masks another tail, is checked
    once a process. The host waits for that: seconds while kernels compile that the call needs
    anyway, a moment otherwise.
    """
    batch, tokens, heads, head_dim = q.shape
    if tokens > CHECKED_TOKENS:
        tokens = CHECKED_TOKENS + tokens % BLOCK
    size = (min(batch, 2), tokens, min(heads, 2), head_dim)
    failure = _failure(q.device, q.dtype, size, min(len(row_indptr), 2))
    if failure is not None:
        raise RuntimeError(f"{failure}; {REMEDY}")


@cache
def _failure(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int, int, int], layouts: int
) -> str | None:
    """Return a sentence that names the first wrong quantity; None if all are right."""
    try:
        fault = find_fault(forward, backward, size, layouts, BLOCK, dtype, device)
    except Exception as error:  # a package that compiles at run time may raise anything
        fault = f"{type(error).__name__}: {error}"
    if fault is None:
        return None
    return f"flash-attn-4 fails its check against the reference at q {size} in {dtype}: {fault}"


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `block_sparse_attention`'s outputs; `valid` must be None and `block` 128."""
    assert lists.valid is None and lists.block == BLOCK
    q, k, v = (_not_expanded(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        out, lse, *_ = _package()._flash_attn_fwd(
            q,
            k,
            v,
            softmax_scale=scale,
            block_sparse_tensors=_tensors(
                lists.row_indices, lists.row_indptr, lists.head_to_layout
            ),
            return_lse=True,
        )
    return out, lse


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
    """Compute dq, dk, dv from the forward's `out` and `lse` in one pass over the columns."""
    assert lists.valid is None and lists.block == BLOCK
    q, k, v = (_not_expanded(x) for x in (q, k, v))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    with torch.cuda.device_of(q):
        _package()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            grad_out,
            lse,
            softmax_scale=scale,
            block_sparse_tensors=_tensors(
                lists.col_indices, lists.col_indptr, lists.head_to_layout
            ),
            dlse=grad_lse,
            dq=dq,
            dk=dk,
            dv=dv,
        )
    return dq, dk, dv


@PerTensor
def _tensors(indices: Tensor, indptr: Tensor, head_to_layout: Tensor) -> Any:
    """Convert CSR lists to flash-attn-4's: counts [1, 1 or H, rows] and, padded to the longest
    row, indices [1, 1 or H, rows, longest], int32.

    All blocks are listed as full ones, in which flash-attn-4 masks only what lies past the
    sequence. It also requires lists of partial blocks: they are empty, so it reads only their
    counts.
    """
    counts = indptr.diff()
    longest = max(1, int(counts.max()))
    place = indptr[:, :-1, None] + torch.arange(longest, device=indices.device)
    # Entries past a row's count are never read, but must exist behind the last row.
    padded = torch.nn.functional.pad(indices, (0, longest))[place]
    if len(indptr) > 1:
        each = head_to_layout.long()
        counts, padded = counts[each], padded[each]
    return _package().BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts[None]),
        mask_block_idx=padded[None],
        full_block_cnt=counts[None],
        full_block_idx=padded[None],
        block_size=(BLOCK, BLOCK),
    )


def _not_expanded(x: Tensor) -> Tensor:
    """Return `x`, copied if it is expanded.

    Strides of 0, as the gradient of a sum has, would make flash-attn-4 compile kernels that the
    self-check has not seen.
    """
    return x.contiguous() if 0 in x.stride() else x


@torch.compiler.assume_constant_result  # torch.compile cannot trace a package's import
def _import_failure() -> str:
    """Return the reason why flash-attn-4 cannot be imported; empty if it can be."""
    try:
        _package()
    except Exception as error:  # ImportError, or anything that its own imports raise
        return str(error) or type(error).__name__
    return ""


def _package() -> Any:
    """Return the module that holds flash-attn-4's kernels."""
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    return interface
