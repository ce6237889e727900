"""Selective activation checkpointing: attention's output is saved, the rest is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from ...kernels.block_sparse.op import OPERATOR

# Takes a tensor to keep, and returns a function that gives it back.
Keep = Callable[[Tensor], Callable[[], Tensor]]

# Ops that return, beside their output, the log-sum-exp that their backward needs. SDPA's fallback
# to matrix products and a softmax is no such op: it would have to keep queries x keys.
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
    """Keep a tensor where it is. An alias is given back, because autograd marks its inputs."""
    return x.detach().detach


def keeping_attention(keep: Keep = kept_on_device) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the two contexts for `context_fn` of `torch.utils.checkpoint`.

    Under the first, the forward, the outputs of self-attention are kept by `keep`. Under the
    second, the recomputation, they are given back without computing attention again. Everything
    else is recomputed, queries, keys and values included.

    PyTorch's own contexts for selective activation checkpointing can only keep tensors on the
    device.
    """
    kept: list[Any] = []
    return _Keeping(kept, keep), _Returning(kept)


def _is_self_attention(op: Any, args: Sequence[Any]) -> bool:
    """Return whether an op is self-attention.

    Cross-attention is cheap to recompute, and its output as large to keep.
    """
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
