"""Gradient checkpointing that keeps what attention returned: its forward then runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from ...kernels.block_sparse.op import OPERATOR

# Given a tensor, what gives it back.
Keep = Callable[[Tensor], Callable[[], Tensor]]

# Each returns, beside its result, the log-sum-exp that its backward needs. SDPA's remaining choice,
# plain matrix products and a softmax, has no such op: it would have to keep queries x keys.
ATTENTION_OPS = frozenset(
    {
        OPERATOR,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def kept_on_device(x: Tensor) -> Callable[[], Tensor]:
    """Keeps a tensor where it is. Gives an alias back: autograd marks what it is handed."""
    return x.detach().detach


def keeping_attention(keep: Keep = kept_on_device) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The two contexts that `torch.utils.checkpoint` takes as `context_fn`: under the first what
    self-attention returns is kept by `keep`, under the second it is handed out in place of a second
    forward. All else is recomputed, queries, keys and values among it.

    What PyTorch calls selective activation checkpointing; its own contexts cannot keep a tensor
    anywhere but on its device.
    """
    kept: list[Any] = []
    return _Keeping(kept, keep), _Returning(kept)


def _is_self_attention(op: Any, args: Sequence[Any]) -> bool:
    """Not that over a caption, which is cheap to compute again and as large to keep."""
    return op in ATTENTION_OPS and args[0].shape == args[1].shape


class _Keeping(TorchDispatchMode):
    def __init__(self, kept: list[Any], keep: Keep) -> None:
        super().__init__()
        self.kept, self.keep = kept, keep

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_self_attention(func, args):
            self.kept.append(tree_map_only(Tensor, self.keep, out))
        return out


class _Returning(TorchDispatchMode):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> Any:
        self.calls = iter(self.kept)  # from the first again: backward may run twice
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_self_attention(func, args):
            return tree_map(lambda x: x() if callable(x) else x, next(self.calls))
        return func(*args, **(kwargs or {}))
