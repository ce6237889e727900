"""One grid's inputs, and every kernel on them as a pair of calls."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longreel.kernels.block_sparse import (
    backward,
    block_sparse_attention,
    forward,
    hopper_backward,
    hopper_forward,
    hopper_fused,
)
from longreel.kernels.block_sparse.lists import Lists
from longreel.kernels.block_sparse.op import Backend
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Radial
from longreel.trainer.run.attention_speedup import milliseconds

from .exact import Expected, expect
from .table import CUDNN, FLEX

BLOCK = 128
# Our kernels: launchers with the signatures of those in forward.py and backward.py.
VARIANTS = {
    "hopper": (hopper_forward.forward, hopper_fused.backward),
    "hopper, deterministic": (hopper_forward.forward, hopper_backward.backward),
    "portable": (forward.forward, backward.backward),
}
DEFAULT = "hopper"  # the one that --growth measures
FLASH_2_TOKENS = 150_000  # not timed on longer sequences, where its rate no longer changes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...]


class Kernel(NamedTuple):
    """Holds a kernel's two calls.

    forward: returns the output first, followed by what `backward` needs besides it. backward:
    returns (dq, dk, dv).
    """

    forward: Callable[[], Tensors]
    backward: Callable[[Tensors], Tensors]

    def step(self) -> tuple[float, float]:
        """Return the milliseconds of each pass."""
        forward, saved = milliseconds(self.forward)
        backward, _ = milliseconds(lambda: self.backward(saved))
        return forward, backward

    def check(self, expected: Expected) -> tuple[str, int]:
        """Return why its times would mean nothing (empty if its results are right) and peak bytes.

        The bytes are those of both passes beyond inputs, output and gradients.
        """
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            saved = self.forward()
            grads = self.backward(saved)
            peak = torch.cuda.max_memory_allocated()
            wrong = expected.complaint(saved[0], grads)
        except Exception as error:  # a compiler's, say; the other kernels are still run
            return f"failed: {type(error).__name__}: {error}".splitlines()[0], 0
        kept = sum(x.numel() * x.element_size() for x in (saved[0], *grads))
        return wrong and f"wrong: {wrong}", peak - before - kept


class Problem:
    """Holds random normal inputs `[1, tokens, heads, head_dim]` in bf16, and the radial layout."""

    def __init__(self, grid: TokenGrid, heads: int, head_dim: int, device: str = "cuda") -> None:
        shape = (1, len(grid), heads, head_dim)
        *qkv, self.grad = (
            torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4)
        )
        self.qkv = tuple(qkv)
        self.layout = build_layout(Radial(), grid, BLOCK).to(device)
        followed = torch.zeros(heads, dtype=torch.int32, device=device)
        rows = self.layout.row_indptr, self.layout.row_indices
        columns = self.layout.col_indptr, self.layout.col_indices
        self.lists = (*rows, *columns, followed)

    @property
    def kept_blocks(self) -> int:
        return len(self.layout.row_indices)

    def flops(self, dense: bool) -> float:
        """Return the FLOPs of a forward pass: two products over the kept blocks, or all pairs."""
        _, tokens, heads, head_dim = self.grad.shape
        pairs = tokens**2 if dense else self.kept_blocks * BLOCK**2
        return 4.0 * heads * head_dim * pairs

    def expected(self, dense: bool) -> Expected:
        kept = None if dense else self.layout.to_dense()[0].to(self.grad.device)
        return expect(self.qkv, self.grad, kept, BLOCK)

    def sparse_kernels(self) -> dict[str, Kernel]:
        return {
            **{name: self.launched(name) for name in VARIANTS},
            "fa4": self.differentiated(self.listed("fa4")),
            FLEX: self.differentiated(self.listed("flex")),
            f"{FLEX}, heads first": self.differentiated(self.listed("flex"), heads_first=True),
        }

    def dense_kernels(self) -> dict[str, Kernel]:
        cudnn = partial(dense, SDPBackend.CUDNN_ATTENTION)
        kernels = {
            CUDNN: self.differentiated(cudnn),
            f"{CUDNN}, heads first": self.differentiated(cudnn, heads_first=True),
        }
        if self.grad.shape[1] <= FLASH_2_TOKENS:
            flash_2 = partial(dense, SDPBackend.FLASH_ATTENTION)
            kernels["dense flash-2"] = self.differentiated(flash_2)
        return kernels

    def launched(self, variant: str) -> Kernel:
        """Return one of our kernels, called without autograd."""
        forward, backward = VARIANTS[variant]
        rest = Lists(*self.lists, None, BLOCK), self.grad.shape[3] ** -0.5
        return Kernel(
            lambda: forward(*self.qkv, *rest),
            lambda saved: backward(self.grad, None, *self.qkv, *saved, *rest),
        )

    def listed(self, backend: Backend) -> Attend:
        """Return a backend of `block_sparse_attention` on these lists; it raises if unavailable."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return block_sparse_attention(q, k, v, *self.lists, block=BLOCK, backend=backend)[0]

        return attend

    def differentiated(self, attend: Attend, heads_first: bool = False) -> Kernel:
        """Return `attend` with autograd's backward.

        heads_first: lay the inputs out in memory as FlexAttention prefers them, [B, H, S, D]; our
        kernels read [B, S, H, D].
        """

        def lying(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else x

        qkv = tuple(lying(x).detach().requires_grad_() for x in self.qkv)
        grad = lying(self.grad)
        return Kernel(
            lambda: (attend(*qkv),), lambda saved: torch.autograd.grad(saved, qkv, (grad,))
        )


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run dense attention with one of torch's own backends."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
