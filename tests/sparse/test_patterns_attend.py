"""Every pattern's attention, forward and backward, with its heads and orders, against an oracle.

The oracle is dense and computed for some queries. The gradient of the output is zero elsewhere, so
that the gradients of all keys and values are complete nevertheless.
"""

import pytest
import torch
from testing import assert_within_budget
from torch import Tensor

from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import PATTERNS, SparsePattern

CASES = {
    "a ragged grid": (TokenGrid(5, 6, 7, text=9), 32, 4, 16, torch.float32, "cpu", 60),
    "HunyuanVideo 2x": pytest.param(
        TokenGrid(64, 45, 80, text=77),
        128,
        4,
        128,
        torch.bfloat16,
        "cuda",
        256,
        marks=pytest.mark.gpu,
    ),
}


def mask_of_rows(
    pattern: SparsePattern, grid: TokenGrid, block: int, heads: int, rows: Tensor
) -> Tensor:
    """[heads, rows, tokens] bool, from `blocks`, `order` and `head_layouts` alone."""
    blocks, order = pattern.blocks(grid.without_text(), block), pattern.order(grid, block)
    layouts = max(pattern.head_layouts(heads)) + 1
    blocks = blocks.expand(layouts, *blocks.shape[-2:])
    place = torch.arange(len(grid)).repeat(layouts, 1)
    if order is not None:
        place[:, : grid.video] = order.expand(layouts, -1).argsort(1)
    kept = []
    for layout in pattern.head_layouts(heads):
        at = place[layout] // block
        last = blocks.shape[-1] - 1
        mask = blocks[layout][at[rows].clamp(max=last)][:, at.clamp(max=last)]
        dense = at >= grid.video // block if grid.text else torch.zeros(len(grid), dtype=torch.bool)
        kept.append(mask | dense[rows, None] | dense)
    return torch.stack(kept)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain masked attention of queries [1, rows, H, D] in their dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (p @ v).transpose(1, 2)


@pytest.mark.parametrize("grid, block, heads, dim, dtype, device, count", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "dense"])
def test_attention_equals_masked_attention(name, grid, block, heads, dim, dtype, device, count):
    generator = torch.Generator().manual_seed(0)
    pattern = PATTERNS[name]()
    shape = (1, len(grid), heads, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    rows = torch.randperm(len(grid), generator=generator)[:count]
    rows[-1] = len(grid) - 1  # text, in the ragged last block
    mask = mask_of_rows(pattern, grid, block, heads, rows).to(device)
    grad = torch.randn(1, count, heads, dim, generator=generator).to(device, dtype)
    grad_out = torch.zeros(shape, device=device, dtype=dtype).index_copy(1, rows.to(device), grad)

    attention = SparseAttention(pattern, block=block)
    attention.plan(grid)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention.attention(0, *leaves)
    grads = torch.autograd.grad(out, leaves, grad_out)
    at = rows.to(device)
    ours = dict(
        zip(("out", "dq", "dk", "dv"), (out[:, at], grads[0][:, at], *grads[1:]), strict=True)
    )
    assert all(x.isfinite().all() for x in (out, *grads))

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        """Head by head, which at full size is what fits."""
        parts = []
        for head in range(heads):
            one = slice(head, head + 1)
            leaves = [x[:, :, one].to(dtype).requires_grad_() for x in (q[:, at], k, v)]
            out = attend_rows(*leaves, mask[None, one])
            grads = torch.autograd.grad(out, leaves, grad[:, :, one].to(dtype))
            parts.append((out.detach(), *grads))
        tensors = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        return dict(zip(("out", "dq", "dk", "dv"), tensors, strict=True))

    oracle, same = plain(torch.float64), plain(dtype)
    for key, expected in oracle.items():
        assert_within_budget(f"{name} {key}", ours[key], same[key], expected)
