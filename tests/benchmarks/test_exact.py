"""The oracle of the benchmark, and what it finds wrong."""

import pytest
import torch
from lib import exact
from torch import Tensor

BLOCK, TOKENS = 16, 150  # the last block is ragged


def inputs(heads: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """q, k, v; the output's gradient; kept blocks."""
    torch.manual_seed(0)
    *qkv, grad = (torch.randn(1, TOKENS, heads, 16, dtype=dtype) for _ in range(4))
    rows = -(-TOKENS // BLOCK)
    return tuple(qkv), grad, torch.eye(rows, dtype=torch.bool) | (torch.rand(rows, rows) < 0.4)


def by_autograd(
    qkv: tuple[Tensor, ...], grad: Tensor, kept: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of all tokens, through torch's own attention."""
    mask = None
    if kept is not None:
        wide = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        mask = wide[:TOKENS, :TOKENS]
    qkv = tuple(x.detach().requires_grad_() for x in qkv)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    return out, torch.autograd.grad(out, qkv, grad)


@pytest.mark.parametrize("sparse", [True, False])
def test_against_autograd(sparse, monkeypatch):
    monkeypatch.setattr(exact, "SCORES_AT_ONCE", 40 * TOKENS)  # several portions, the last short
    qkv, grad, kept = inputs(1, torch.float64)
    kept = kept if sparse else None
    out, (dq, dk, dv) = by_autograd(qkv, grad, kept)
    head = exact.Head(*(x[0, :, 0] for x in (*qkv, grad)), kept, BLOCK)
    chosen = torch.tensor([0, 77, TOKENS - 1])
    found = (*head.at_queries(chosen), *head.at_keys(chosen))
    for got, want in zip(found, (out, dq, dk, dv), strict=True):
        torch.testing.assert_close(got, want.detach()[0, chosen, 0])


def test_nothing_is_wrong_with_bf16():
    qkv, grad, kept = inputs(2, torch.float32)
    out, grads = by_autograd(qkv, grad, kept)
    rounded = [x.detach().bfloat16() for x in (out, *grads)]
    assert exact.expect(qkv, grad, kept, BLOCK).complaint(rounded[0], rounded[1:]) == ""


def test_a_block_too_few_is_wrong_in_every_part():
    qkv, grad, kept = inputs(2, torch.float32)
    expected = exact.expect(qkv, grad, kept, BLOCK, samples=TOKENS)
    fewer = kept.clone()
    row = int(kept.sum(1).argmax())
    fewer[row, row] = False
    out, grads = by_autograd(qkv, grad, fewer)
    complaints = expected.complaint(out, grads).split("; ")
    assert all(complaint.startswith("relative error") for complaint in complaints)
    assert [complaint.split()[-1] for complaint in complaints] == ["out", "dq", "dk", "dv"]


def test_a_stray_nan_is_wrong_wherever_it_is():
    qkv, grad, kept = inputs(2, torch.float32)
    expected = exact.expect(qkv, grad, kept, BLOCK, samples=2)
    out, (dq, dk, dv) = by_autograd(qkv, grad, kept)
    dk[0, 70, 0, 3] = float("nan")  # neither a sampled token nor the head whose dk is compared
    assert expected.complaint(out, (dq, dk, dv)) == "dk is not finite"
