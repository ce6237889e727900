"""Check another package's kernels against our oracle, on the GPU and for the inputs in use."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .lists import Lists

QUANTITIES = ("out", "lse", "dq", "dk", "dv")


def find_fault(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    size: tuple[int, int, int, int],
    layouts: int,
    block: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Return the first quantity that a backend gets wrong, and by how much; None if it is right.

    The check runs one forward and one backward, with gradients of both outputs, over random lists
    with an empty row and an empty column. Each of `QUANTITIES` may be twice as far from the fp64
    `reference` as plain PyTorch in `dtype` is, plus one rounding of its largest element. Random
    numbers come from a separate generator, so a training run's are not touched.

    Args:
        forward, backward: functions with the arguments of `forward.forward` and
            `backward.backward` (Triton).
        size: [B, S, H, D] of q. The oracle takes time, and plain PyTorch memory, quadratic in S:
            a few thousand tokens at most.
        layouts: number of layouts; head h uses layout h % layouts.
        block: tokens per block.
        dtype, device: those of the inputs to check.
    """
    batch, tokens, heads, head_dim = size
    seeded = torch.Generator(device).manual_seed(0)
    floats = {"generator": seeded, "device": device, "dtype": torch.float32}
    q, k, v = torch.randn(batch, tokens, 3, heads, head_dim, **floats).to(dtype).unbind(2)
    grad_out = torch.randn(size, **floats).to(dtype)
    grad_lse = torch.randn(batch, heads, tokens, **floats)
    rows = -(-tokens // block)
    keep = torch.rand(layouts, rows, rows, **floats) < 0.5
    keep |= torch.eye(rows, dtype=torch.bool, device=device)
    if rows > 2:
        keep[:, 1, :] = False
        keep[:, :, 2] = False
    to_layout = (torch.arange(heads, device=device) % layouts).int()
    lists = Lists(*_csr(keep), *_csr(keep.mT), to_layout, None, block)
    scale = head_dim**-0.5

    exact = q.double(), k.double(), v.double()
    out, lse = reference.forward(*exact, lists, scale)
    grads = (grad_out.double(), grad_lse.double())
    oracle = (out, lse, *reference.backward(*grads, *exact, out, lse, lists, scale))

    out, lse = forward(q, k, v, lists, scale)
    saved = (grad_out, grad_lse, q, k, v, out, lse)
    got = (out, lse, *backward(*saved, lists, scale))

    key_block = torch.arange(tokens, device=device) // block
    mask = keep[to_layout.long()][:, key_block[:, None], key_block]
    with torch.autocast(device.type, enabled=False):
        measure = _plain(q, k, v, grad_out, grad_lse.to(dtype), mask, scale)

    for name, value, same_dtype, expected in zip(QUANTITIES, got, measure, oracle, strict=True):
        error, plain = _largest_error(value, expected), _largest_error(same_dtype, expected)
        largest = expected.masked_fill(expected == float("-inf"), 0).abs().max().item()
        if not error <= 2 * plain + torch.finfo(value.dtype).eps * largest:
            return f"{name} is off by {error:.1e}, plain PyTorch in {dtype} by {plain:.1e}"
    return None


def _csr(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Turn bool [L, rows, columns] into int32 indptr [L, rows + 1] and indices [nnz]."""
    layouts, rows, _ = keep.shape
    ends = torch.nn.functional.pad(keep.sum(-1).flatten().cumsum(0), (1, 0))
    starts = torch.arange(layouts, device=keep.device)[:, None] * rows
    indptr = ends[starts + torch.arange(rows + 1, device=keep.device)]
    return indptr.int(), keep.nonzero()[:, 2].int()


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    mask: Tensor,
    scale: float,
) -> Sequence[Tensor]:
    """Compute `QUANTITIES` in plain PyTorch, all in q's dtype, with all scores in memory."""
    q, k, v, grad_out = (x.transpose(1, 2) for x in (q, k, v, grad_out))
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1).masked_fill(~mask, 0)  # NaN where a query sees no key
    out = p @ v
    delta = (out * grad_out).sum(-1) - grad_lse
    ds = p * (grad_out @ v.mT - delta[..., None])
    tokens_first = (out, ds @ k * scale, ds.mT @ q * scale, p.mT @ grad_out)
    out, dq, dk, dv = (x.transpose(1, 2) for x in tokens_first)
    return out, scores.logsumexp(-1), dq, dk, dv


def _largest_error(value: Tensor, expected: Tensor) -> float:
    """Return the largest distance of two tensors: 0 for equal infinities, NaN for a NaN."""
    return torch.where(value == expected, 0, value.double() - expected).abs().max().item()
