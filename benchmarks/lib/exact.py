"""Attention and its gradients at sampled tokens, in fp32 and straight from the formulas.

The output and dq are computed at some queries of every head. dk and dv are computed at some keys of
the last head; they need all of its queries, which are taken in chunks so that any length fits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative error of a token's vector. bf16 kernels reach 0.004 at the worst token; one block of 128
# keys too many or too few in 250,000 gives 0.02.
TOLERANCE = 1e-2
SCORES_AT_ONCE = 2**28


@dataclass(frozen=True)
class Head:
    """Holds one head: q, k, v and the output's gradient `[tokens, head_dim]`, fp32 or fp64.

    kept: blocks, bool `[rows, rows]`; None keeps all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    kept: Tensor | None
    block: int

    @property
    def scale(self) -> float:
        return self.q.shape[1] ** -0.5

    def attend(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities over all keys, outputs, and rowsum(output * its gradient)."""
        scores = self.q[queries] @ self.k.T * self.scale
        if self.kept is not None:
            key_block = torch.arange(len(self.k), device=self.k.device) // self.block
            scores.masked_fill_(~self.kept[queries // self.block][:, key_block], float("-inf"))
        p = scores.softmax(-1)
        out = p @ self.v
        return p, out, (out * self.grad[queries]).sum(-1, keepdim=True)

    def at_queries(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and dq at these queries."""
        p, out, delta = self.attend(queries)
        ds = p * (self.grad[queries] @ self.v.T - delta)
        return out, ds @ self.k * self.scale

    def at_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return dk and dv at these keys."""
        dk, dv = torch.zeros_like(self.k[keys]), torch.zeros_like(self.v[keys])
        tokens = torch.arange(len(self.q), device=self.q.device)
        for queries in tokens.split(max(1, SCORES_AT_ONCE // len(tokens))):
            p, _, delta = self.attend(queries)
            p, grad = p[:, keys], self.grad[queries]
            dv += p.T @ grad
            dk += (p * (grad @ self.v[keys].T - delta)).T @ self.q[queries] * self.scale
        return dk, dv


@dataclass(frozen=True)
class Expected:
    """Holds what a kernel must return at the sampled tokens, `[sampled, heads or 1, head_dim]`."""

    tokens: Tensor
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def complaint(self, out: Tensor, grads: Sequence[Tensor]) -> str:
        """Return what is wrong with these `[1, tokens, heads, head_dim]`; empty if nothing is."""
        return "; ".join(self._complaints(out, *grads))

    def _complaints(self, *results: Tensor) -> Iterator[str]:
        for name, result in zip(("out", "dq", "dk", "dv"), results, strict=True):
            want: Tensor = getattr(self, name)
            got = result.detach()[0, self.tokens, -want.shape[1] :].to(want.dtype)
            error = ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
            if not result.isfinite().all():
                yield f"{name} is not finite"
            elif not error < TOLERANCE:
                yield f"relative error {error:.1e} of {name}"


def expect(
    qkv: Sequence[Tensor], grad: Tensor, kept: Tensor | None, block: int, samples: int = 64
) -> Expected:
    """Compute the expected results at sampled tokens, always with the first and the last one.

    Inputs are `[1, tokens, heads, head_dim]`.
    """
    q, k, v, grad = (x.detach()[0] for x in (*qkv, grad))
    tokens = torch.randperm(len(q), device=q.device)[:samples]
    tokens[0], tokens[-1] = 0, len(q) - 1

    def of(head: int) -> Head:
        return Head(*(x[:, head].float() for x in (q, k, v, grad)), kept, block)

    by_head = [of(head).at_queries(tokens) for head in range(q.shape[1])]
    out, dq = (torch.stack(parts, 1) for parts in zip(*by_head, strict=True))
    dk, dv = (x[:, None] for x in of(-1).at_keys(tokens))
    return Expected(tokens, out, dq, dk, dv)
