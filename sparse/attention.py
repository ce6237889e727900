"""`SparseAttention`: a model's self-attention, sparse by default, dense where settings say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ..kernels.block_sparse import block_sparse_attention
from ..kernels.block_sparse.op import Backend
from .grid import TokenGrid
from .layout import BlockLayout, build_layout
from .patterns import Dense, SparsePattern

# The index of a diffusion step, or (index, number of steps): counting from the last needs both.
Step = int | tuple[int, int]
# Returns the context managers for a block's forward and for its recomputation.
ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """The geometry of one forward of the model, set before it and shared by all of its layers."""

    grid: TokenGrid
    valid: tuple[int, ...] | None  # real tokens of each sample; the rest is padded text
    dense: bool  # True in a dense diffusion step


class Exchange(Protocol):
    """Exchanges tokens for heads between processes that share a sequence.

    Outside of attention a process holds some of the video's tokens and all of the text, with all
    heads; inside it holds all tokens with some of the heads. `trainer.parallel` implements it.
    """

    def own_heads(self, heads: int) -> slice:
        """Return the slice of the model's heads that this process computes inside attention."""
        ...

    def to_heads(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Turn `[B, own tokens, heads, D]` into `[B, len(grid), own heads, D]`, differentiably."""
        ...

    def to_tokens(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Turn `[B, len(grid), own heads, D]` back into `[B, own tokens, heads, D]`."""
        ...


@dataclass(eq=False)
class SparseAttention:
    """Computes the self-attention of one model and holds its settings.

    pattern: decides which tokens attend to which. `Dense` means SDPA in every layer.
    block: tokens per block, a power of two; the kernels are tuned for 128.
    backend: the backend of `block_sparse_attention`.
    dense_layers: a number k for the first k layers, or the indices of the layers that stay dense.
    dense_steps: the same for diffusion steps when sampling; indices below 0 count from the last.
    schedule: set while sampling; turns the model's timestep into the `step` of `plan`. (Counting
        calls would not do: guidance may call the model twice a step.)
    exchange: connects the processes that share the sequence; None when there are none. With one,
        `attention` takes and returns this process's tokens.
    """

    pattern: SparsePattern
    block: int = 128
    backend: Backend = "auto"
    dense_layers: int | Collection[int] = 0
    dense_steps: int | Collection[int] = 0
    schedule: Callable[[Tensor], Step] | None = None
    exchange: Exchange | None = None
    _plan: ForwardPlan | None = field(default=None, init=False, repr=False)

    def plan(
        self, grid: TokenGrid, *, valid: Sequence[int] | None = None, step: Step | None = None
    ) -> None:
        """Set the geometry of the coming forward, in which every layer then calls `attention`.

        valid: real tokens of each sample's sequence. The rest is padded text: no token attends to
            it, and its own result is meaningless. None when nothing is padded.
        step: the diffusion step when sampling, as its index or `(index, steps)`; None when
            training.

        Raises:
            ValueError: if `dense_steps` counts from the last step and `step` is an index alone.
        """
        self._plan = self.planned(grid, valid=valid, step=step)

    def planned(
        self, grid: TokenGrid, *, valid: Sequence[int] | None = None, step: Step | None = None
    ) -> ForwardPlan:
        """Return the plan that `plan` would set, to pass to `using`."""
        lengths = None if valid is None or min(valid) == len(grid) else tuple(valid)
        return ForwardPlan(grid, lengths, step is not None and _is_chosen(self.dense_steps, step))

    @property
    def current(self) -> ForwardPlan | None:
        """The plan of the current forward, or of the last one."""
        return self._plan

    @contextmanager
    def using(self, plan: ForwardPlan | None) -> Iterator[None]:
        """Make `plan` the current one inside a `with` block and restore the previous one after."""
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    def recomputing(
        self,
        function: Callable[..., object],
        *args: object,
        context_fn: ContextFn = noop_context_fn,
    ) -> object:
        """Run a block with activation checkpointing, recomputed under the plan of its forward.

        Pass it to a diffusers model's `enable_gradient_checkpointing`. The plan is kept because
        another forward may set another one before this one's backward runs.

        context_fn: an argument of `torch.utils.checkpoint`; selective checkpointing passes one.
        """
        plan = self._plan

        def under_plan(*args: object) -> object:
            with self.using(plan):
                return function(*args)

        return checkpoint(under_plan, *args, use_reentrant=False, context_fn=context_fn)

    def is_dense(self, layer_index: int, plan: ForwardPlan | None = None) -> bool:
        """Return whether a layer is dense under `plan`; without a plan, in a sparse step."""
        if isinstance(self.pattern, Dense) or (plan is not None and plan.dense):
            return True
        chosen = self.dense_layers
        return layer_index < chosen if isinstance(chosen, int) else layer_index in chosen

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """Return the block layout of `grid`, on the CPU."""
        return build_layout(self.pattern, grid, self.block)

    def sparse_density(self, grid: TokenGrid, heads: int | None = None) -> float:
        """Return the share of all token pairs that one sparse layer computes, text included.

        heads: number of heads, to weight each layout by the heads that use it; None weights all
            layouts equally.
        """
        layout_of_head = None if heads is None else self.pattern.head_layouts(heads)
        return self.layout(grid).token_density(len(grid), layout_of_head)

    def layer_densities(
        self, grid: TokenGrid, layers: int, heads: int | None = None
    ) -> list[float]:
        """Return the computed share of each of `layers` layers; that of a dense one is 1."""
        sparse = self.sparse_density(grid, heads)
        return [1.0 if self.is_dense(index) else sparse for index in range(layers)]

    def token_density(self, grid: TokenGrid, layers: int, heads: int | None = None) -> float:
        """Return the mean computed share over `layers` layers, text and dense ones included."""
        return sum(self.layer_densities(grid, layers, heads)) / layers

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute one layer's attention on q, k and v, `[batch, tokens, heads, head_dim]`.

        Raises:
            RuntimeError: if no plan was set.
            ValueError: if the plan is for another number of tokens.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("SparseAttention.plan must be called before the model's forward.")
        heads, exchange = q.shape[2], self.exchange
        if exchange is not None:
            q, k, v = (exchange.to_heads(x, plan.grid) for x in (q, k, v))
        if len(plan.grid) != q.shape[1]:
            raise ValueError(f"{q.shape[1]} tokens were given, but the plan is for {plan.grid}.")
        if self.is_dense(layer_index, plan):
            out = _dense_attention(q, k, v, plan.valid)
        else:
            out = self._sparse_attention(plan, heads, q, k, v)
        return out if exchange is None else exchange.to_tokens(out, plan.grid)

    def _sparse_attention(
        self, plan: ForwardPlan, heads: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Compute sparse attention; q, k and v hold this process's part of the model's `heads`."""
        # torch types `disable` as what it returns when it is called without a function.
        lists = _lists(self, plan, heads, q.device)  # pyright: ignore[reportCallIssue]
        if lists.orders is not None:
            there, back = lists.orders
            q, k, v = (_reorder(x, there, back) for x in (q, k, v))
        out, _ = block_sparse_attention(
            q,
            k,
            v,
            lists.layout.row_indptr,
            lists.layout.row_indices,
            lists.layout.col_indptr,
            lists.layout.col_indices,
            lists.head_to_layout,
            block=self.block,
            valid=lists.valid,
            backend=self.backend,
        )
        if lists.orders is not None:
            there, back = lists.orders
            out = _reorder(out, back, there)
        return out


class _Lists(NamedTuple):
    """The index tensors that one call of the attention reads, on its device."""

    layout: BlockLayout
    head_to_layout: Tensor  # [heads]
    orders: tuple[Tensor, Tensor] | None  # for `_gather`: into the heads' orders, and back
    valid: Tensor | None  # [batch]


@torch.compiler.disable  # tracing would rebuild the lists and bypass their caches
def _lists(
    attention: SparseAttention, plan: ForwardPlan, heads: int, device: torch.device
) -> _Lists:
    layout = attention.layout(plan.grid)
    layout_of_head = tuple(attention.pattern.head_layouts(heads))
    if attention.exchange is not None:
        layout_of_head = layout_of_head[attention.exchange.own_heads(heads)]
    orders = _orders(layout, layout_of_head, device)
    if orders is not None:
        order, inverse = orders
        end = len(plan.grid) * (len(order) // (layout.rows * layout.block))
        orders = order[:end], inverse[:end]
    lengths = None if plan.valid is None else _lengths(plan.valid, device)
    to_layout = _head_to_layout(layout_of_head, device)
    return _Lists(_on_device(layout, device), to_layout, orders, lengths)


def _is_chosen(chosen: int | Collection[int], step: Step) -> bool:
    """Return whether a step is one of the first `chosen` (a number) or listed in `chosen`."""
    index, count = (step, None) if isinstance(step, int) else step
    if isinstance(chosen, int):
        return index < chosen
    if count is None and any(i < 0 for i in chosen):
        raise ValueError(
            f"dense_steps={sorted(chosen)} counts from the last step: call plan with "
            "step=(index, steps), not with the index alone."
        )
    return index in chosen or (count is not None and index - count in chosen)


class _Reorder(torch.autograd.Function):
    """Permutes tokens by `_gather`; the backward is a gather too, by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return _gather(x, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _gather(grad, ctx.inverse), None, None


def _reorder(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    result: Any = _Reorder.apply(x, index, inverse)
    return result


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Permute x `[batch, tokens, heads, dim]` by `index`, which counts tokens, or (token, head)
    pairs if it is longer.

    Whole rows are selected along the first dimension: the case in which `index_select` is fast.
    """
    batch, size = len(x), len(index)
    if batch > 1:
        start = torch.arange(batch, dtype=index.dtype, device=index.device) * size
        index = (start[:, None] + index).flatten()
    return x.reshape(batch * size, -1).index_select(0, index).view(x.shape)


@lru_cache(maxsize=8)  # 180 MB a pair for 460,800 tokens and 48 heads in two orders
def _orders(
    layout: BlockLayout, layout_of_head: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return int32 indices for `_gather`, into the heads' token orders and back; None if every
    head takes tokens in raster order.

    Shape `[tokens]` where all heads share one order, `[tokens * heads]` otherwise. They cover as
    many tokens as the layout's blocks hold; a shorter sequence takes the first of them.
    """
    if layout.order is None or layout.inverse is None:
        return None
    with torch.inference_mode(False):
        orders = layout.order[sorted(set(layout_of_head))]
        if (orders == torch.arange(orders.shape[1])).all():
            return None
        shared = bool((orders == orders[0]).all())
        order, inverse = (
            _index(table[list(layout_of_head)], shared).to(device)
            for table in (layout.order, layout.inverse)
        )
    return order, inverse


def _index(orders: Tensor, shared: bool) -> Tensor:
    """Turn orders `[heads, tokens]` into one index: of (token, head) pairs with heads fastest, or
    of tokens if all heads share one order."""
    if shared:
        return orders[0].contiguous()
    heads = len(orders)
    return (orders.T * heads + torch.arange(heads, dtype=orders.dtype)).flatten()


@lru_cache(maxsize=32)
def _on_device(layout: BlockLayout, device: torch.device) -> BlockLayout:
    """Return a copy on `device`.

    It is made outside of inference mode, as the tensors below are, because it is cached: a later
    backward may save these very tensors.
    """
    with torch.inference_mode(False):
        return layout.to(device)


@lru_cache(maxsize=32)
def _head_to_layout(layout_of_head: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(layout_of_head, dtype=torch.int32, device=device)


@lru_cache(maxsize=32)
def _lengths(valid: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(valid, dtype=torch.int32, device=device)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, valid: tuple[int, ...] | None) -> Tensor:
    """Compute SDPA without a mask, which would rule out its fused kernels: padding is cut off, and
    its output is zeros."""
    if valid is None:
        return _sdpa(q, k, v)
    rows = []
    for index, length in enumerate(valid):
        row = _sdpa(*(x[index : index + 1, :length] for x in (q, k, v)))
        rows.append(F.pad(row, (0, 0, 0, 0, 0, q.shape[1] - length)))
    return torch.cat(rows)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
