"""Inputs, oracles and error budgets shared by the tests."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lists:
    """Kept blocks of L layouts as the kernels take them; `keep` [L, rows, rows] is the truth."""

    keep: Tensor
    row_indptr: Tensor
    row_indices: Tensor
    col_indptr: Tensor
    col_indices: Tensor
    head_to_layout: Tensor
    block: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The list arguments of `block_sparse_attention`, in order."""
        return (
            self.row_indptr,
            self.row_indices,
            self.col_indptr,
            self.col_indices,
            self.head_to_layout,
        )


def make_lists(keep: Tensor, block: int, head_to_layout: list[int]) -> Lists:
    """CSR by rows and by columns of `keep` [L, rows, rows] bool."""
    device = keep.device
    flat, indptr = [], []
    for one in (keep, keep.mT):
        counts = one.sum(-1).flatten()
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        starts = torch.arange(len(keep), device=device)[:, None] * keep.shape[1]
        place = starts + torch.arange(keep.shape[1] + 1, device=device)
        indptr.append(ends[place].int())
        flat.append(one.nonzero()[:, 2].int())
    return Lists(
        keep,
        indptr[0],
        flat[0],
        indptr[1],
        flat[1],
        torch.tensor(head_to_layout, dtype=torch.int32, device=device),
        block,
    )


def random_lists(
    tokens: int, block: int, head_to_layout: list[int], density: float = 0.5, device="cpu"
) -> Lists:
    """Random blocks, with one empty row and one empty column in each layout."""
    rows = -(-tokens // block)
    keep = torch.rand(max(head_to_layout) + 1, rows, rows, device=device) < density
    keep |= torch.eye(rows, dtype=torch.bool, device=device)
    if rows > 2:
        keep[:, 1, :] = False
        keep[:, :, 2] = False
    return make_lists(keep, block, head_to_layout)


def token_mask(lists: Lists, tokens: int, valid: Tensor | None = None) -> Tensor:
    """[1 or B, H, tokens, tokens] bool: which keys count for which queries."""
    block = torch.arange(tokens, device=lists.keep.device) // lists.block
    mask = lists.keep[lists.head_to_layout.long()][:, block[:, None], block][None]
    if valid is not None:
        counts = torch.arange(tokens, device=mask.device) < valid[:, None]
        mask = mask & counts[:, None, None, :]
    return mask


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention as PyTorch writes it, all in q's dtype: out and lse."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT) * scale
    sees = mask.any(-1)
    scores = scores.masked_fill(~mask & sees[..., None], float("-inf"))
    p = scores.softmax(-1).masked_fill(~sees[..., None], 0)
    lse = scores.logsumexp(-1).masked_fill(~sees, float("-inf"))
    return (p @ v).transpose(1, 2), lse


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor):
    """{name: tensor} of what `attend(q, k, v) -> (out, lse)` returns and of its gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves)
    # No gradient can be asked of a log-sum-exp of -inf.
    finite = lse.detach() > float("-inf")
    grad_lse = torch.where(finite, grad_lse, 0).to(lse.dtype)
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (grad_out.to(out.dtype), grad_lse))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def assert_within_budget(
    name: str,
    got: Tensor,
    same_dtype: Tensor,
    oracle: Tensor,
    slack: float = 2.0,
    exponent: float = 0.0,
) -> None:
    """`got` may be `slack` times as far from the fp64 `oracle` as plain PyTorch in its dtype is.

    Infinities must agree exactly. Forgiven besides: one rounding of the largest element, since
    plain PyTorch can be exact by luck, and what rounding an `exponent` this large to fp32 does.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(got[~finite].double(), oracle[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    error, allowed = ((x.double() - oracle)[finite].abs().max().item() for x in (got, same_dtype))
    relative = torch.finfo(got.dtype).eps + torch.finfo(torch.float32).eps * exponent
    budget = slack * allowed + relative * oracle[finite].abs().max().item()
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@dataclass(frozen=True)
class Case:
    """One attention problem of batch 2, small enough for a dense oracle."""

    dtype: torch.dtype = torch.float32
    tokens: int = 72  # ragged for every block size
    head_dim: int = 16
    block: int = 16
    valid: tuple[int, int] | None = None
    layouts: tuple[int, ...] = (0, 1, 0)  # of each head
    scale: float | None = None
    std: float = 1.0
    shift: float = 0.0  # of q up and of k down: logits near -scale * shift ** 2 * head_dim

    def make(self, device="cpu"):
        """q, k, v as views of one projection, gradients of both outputs, lists and valid."""
        heads = len(self.layouts)
        size = (2, self.tokens, 3, heads, self.head_dim)
        qkv = torch.randn(size, device=device) * self.std
        qkv[:, :, 0] += self.shift
        qkv[:, :, 1] -= self.shift
        q, k, v = qkv.to(self.dtype).unbind(2)
        grad_out = torch.randn(2, self.tokens, heads, self.head_dim, device=device)
        grad_lse = torch.randn(2, heads, self.tokens, device=device)
        lists = random_lists(self.tokens, self.block, list(self.layouts), device=device)
        valid = self.valid
        if valid is not None:
            valid = torch.tensor(valid, dtype=torch.int32, device=device)
        return (q, k, v), (grad_out, grad_lse), lists, valid


def check_attention(attend, case: Case, device="cpu", move=lambda x: x) -> None:
    """Hold out, lse and all gradients of `attend` to twice plain PyTorch's error.

    `move` puts each of q, k, v elsewhere in memory, for layouts that a case does not make.
    """
    qkv, (grad_out, grad_lse), lists, valid = case.make(device)
    scale = case.scale or case.head_dim**-0.5
    mask = token_mask(lists, case.tokens, valid)

    def plain(q, k, v):
        return plain_attention(q, k, v, mask, scale)

    def ours(q, k, v):
        q, k, v = (move(x) for x in (q, k, v))
        return attend(q, k, v, *lists.tensors, block=case.block, valid=valid, scale=case.scale)

    grad_out = grad_out.to(case.dtype)
    oracle = with_gradients(plain, *(x.double() for x in qkv), grad_out, grad_lse)
    same = with_gradients(plain, *qkv, grad_out, grad_lse)
    got = with_gradients(ours, *qkv, grad_out, grad_lse)
    assert got["out"].dtype == case.dtype and got["out"].is_contiguous()
    assert got["lse"].dtype == torch.float32
    exponent = oracle["lse"].nan_to_num(neginf=0).abs().max().item()
    for name, expected in oracle.items():
        assert_within_budget(name, got[name], same[name], expected, exponent=exponent)
