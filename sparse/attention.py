"""Attention as a model's layers call it: sparse by a plan, dense where the recipe says so."""

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

# Index of a diffusion step; with the number of steps where the last ones are to be told.
Step = int | tuple[int, int]
# The contexts of a checkpointed forward and of its recomputation.
ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one forward of the model computes: set before it, the same for all of its layers."""

    grid: TokenGrid
    valid: tuple[int, ...] | None  # tokens of each sample that count; the rest is padded text
    dense: bool  # a dense diffusion step


class Exchange(Protocol):
    """Between processes that share a sequence; `trainer.parallel` has the one that there is.

    Outside of attention a process has some of the video's tokens and all of the text, with all
    heads of them; inside, all tokens with some heads.
    """

    def own_heads(self, heads: int) -> slice:
        """Which of the model's heads are this process's inside."""
        ...

    def to_heads(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """`[B, own tokens, heads, D]` to `[B, len(grid), own heads, D]`, differentiable."""
        ...

    def to_tokens(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """The way back."""
        ...


@dataclass(eq=False)
class SparseAttention:
    """The self-attention of one model.

    pattern: which tokens attend to which. `Dense` means SDPA in every layer.
    block: tokens of a block, a power of two; the kernels are tuned for 128.
    backend: of `block_sparse_attention`.
    dense_layers: a number k for the first k layers, or the indices of the layers that stay dense.
    dense_steps: the same for diffusion steps when sampling; indices below 0 count from the last.
    schedule: set while sampling; the `step` of `plan` for a forward with the model's timestep.
        Guidance may call the model twice a step.
    exchange: with the processes that share the sequence; None when there are none. `attention`
        then takes and gives this process's tokens.
    """

    pattern: SparsePattern
    block: int = 128
    backend: Backend = "auto"
    dense_layers: int | Collection[int] = 0
    dense_steps: int | Collection[int] = 0
    schedule: Callable[[Tensor], Step] | None = None
    exchange: Exchange | None = None
    _plan: Plan | None = field(default=None, init=False, repr=False)

    def plan(
        self, grid: TokenGrid, *, valid: Sequence[int] | None = None, step: Step | None = None
    ) -> None:
        """Set the geometry of the coming forward; every layer then calls `attention`.

        valid: how many tokens of each sample's sequence count; the rest is padded text, which no
            token attends to, and whose own result means nothing. None when nothing is padded.
        step: the diffusion step when sampling, its index or `(index, steps)`; None when training.

        Raises:
            ValueError: if dense steps count from the last and `step` does not tell how many.
        """
        self._plan = self.planned(grid, valid=valid, step=step)

    def planned(
        self, grid: TokenGrid, *, valid: Sequence[int] | None = None, step: Step | None = None
    ) -> Plan:
        """The plan that `plan` would set, for `using`."""
        lengths = None if valid is None or min(valid) == len(grid) else tuple(valid)
        return Plan(grid, lengths, step is not None and _is_chosen(self.dense_steps, step))

    @property
    def current(self) -> Plan | None:
        """The plan of the forward that runs or ran last."""
        return self._plan

    @contextmanager
    def using(self, plan: Plan | None) -> Iterator[None]:
        """Within it `plan` is the current one; afterwards the one before is again."""
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    def checkpoint(
        self,
        function: Callable[..., object],
        *args: object,
        context_fn: ContextFn = noop_context_fn,
    ) -> object:
        """Gradient checkpointing of one block that recomputes under the plan its forward saw.

        Pass it to a diffusers model's `enable_gradient_checkpointing`. Another forward may set
        another plan before this one's backward runs. context_fn: of `torch.utils.checkpoint`, such
        as `keep.keeping_attention`.
        """
        plan = self._plan

        def under_plan(*args: object) -> object:
            with self.using(plan):
                return function(*args)

        return checkpoint(under_plan, *args, use_reentrant=False, context_fn=context_fn)

    def is_dense(self, layer_index: int, plan: Plan | None = None) -> bool:
        """Whether a layer runs dense attention under `plan` (without one: in a sparse step)."""
        if isinstance(self.pattern, Dense) or (plan is not None and plan.dense):
            return True
        chosen = self.dense_layers
        return layer_index < chosen if isinstance(chosen, int) else layer_index in chosen

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """The block layout of `grid`, on the CPU."""
        return build_layout(self.pattern, grid, self.block)

    def sparse_density(self, grid: TokenGrid, heads: int | None = None) -> float:
        """Executed share of all token pairs in one sparse layer, text counted.

        heads: of the model, whose share of each layout counts; None: all layouts count alike.
        """
        followed = None if heads is None else self.pattern.head_layouts(heads)
        return self.layout(grid).token_density(len(grid), followed)

    def layer_densities(
        self, grid: TokenGrid, layers: int, heads: int | None = None
    ) -> list[float]:
        """The same of each of `layers` layers; dense ones compute everything."""
        sparse = self.sparse_density(grid, heads)
        return [1.0 if self.is_dense(index) else sparse for index in range(layers)]

    def token_density(self, grid: TokenGrid, layers: int, heads: int | None = None) -> float:
        """Executed share of all token pairs over `layers` layers, text and dense layers counted."""
        return sum(self.layer_densities(grid, layers, heads)) / layers

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; q, k, v and the result are `[batch, tokens, heads, head_dim]`."""
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

    def _sparse_attention(self, plan: Plan, heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """heads: of the model, of which q, k and v hold this process's."""
        # `disable` is typed for its call without a function.
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
    """What one call of the attention reads, on its device."""

    layout: BlockLayout
    head_to_layout: Tensor  # [heads]
    orders: tuple[Tensor, Tensor] | None  # for `_gather`: into the heads' orders, and back
    valid: Tensor | None  # [batch]


@torch.compiler.disable  # it would trace how lists are made, and past their caches
def _lists(attention: SparseAttention, plan: Plan, heads: int, device: torch.device) -> _Lists:
    layout = attention.layout(plan.grid)
    followed = tuple(attention.pattern.head_layouts(heads))
    if attention.exchange is not None:
        followed = followed[attention.exchange.own_heads(heads)]
    orders = _orders(layout, followed, device)
    if orders is not None:
        order, inverse = orders
        end = len(plan.grid) * (len(order) // (layout.rows * layout.block))
        orders = order[:end], inverse[:end]
    lengths = None if plan.valid is None else _lengths(plan.valid, device)
    to_layout = _head_to_layout(followed, device)
    return _Lists(_on_device(layout, device), to_layout, orders, lengths)


def _is_chosen(chosen: int | Collection[int], step: Step) -> bool:
    """Whether a step is among the first `chosen`, or one of them."""
    index, count = (step, None) if isinstance(step, int) else step
    if isinstance(chosen, int):
        return index < chosen
    if count is None and any(i < 0 for i in chosen):
        raise ValueError(
            f"dense_steps={sorted(chosen)} counts from the last step: plan with step=(index, "
            "steps), not the index alone."
        )
    return index in chosen or (count is not None and index - count in chosen)


class _Reorder(torch.autograd.Function):
    """`x.flatten(0, n)[index]`, whose backward is a gather too, by the inverse permutation."""

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
    """x `[batch, tokens, heads, dim]` by `index`: of tokens, or of (token, head) pairs if longer.

    Whole rows along the first dimension, which is the case that `index_select` is fast in.
    """
    batch, size = len(x), len(index)
    if batch > 1:
        start = torch.arange(batch, dtype=index.dtype, device=index.device) * size
        index = (start[:, None] + index).flatten()
    return x.reshape(batch * size, -1).index_select(0, index).view(x.shape)


@lru_cache(maxsize=8)  # 180 MB a pair for 460,800 tokens and 48 heads in two orders
def _orders(
    layout: BlockLayout, followed: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Indices for `_gather`, int32, there and back, for as many tokens as the layout's blocks hold:
    a shorter sequence takes the first of them. None if every head takes tokens as they come.

    `[tokens]` where all heads share one order, `[tokens * heads]` otherwise.
    """
    if layout.order is None or layout.inverse is None:
        return None
    with torch.inference_mode(False):
        orders = layout.order[sorted(set(followed))]
        if (orders == torch.arange(orders.shape[1])).all():
            return None
        shared = bool((orders == orders[0]).all())
        order, inverse = (
            _index(table[list(followed)], shared).to(device)
            for table in (layout.order, layout.inverse)
        )
    return order, inverse


def _index(orders: Tensor, shared: bool) -> Tensor:
    """orders: `[heads, tokens]`; of (token, head) pairs, heads fastest, unless they share one."""
    if shared:
        return orders[0].contiguous()
    heads = len(orders)
    return (orders.T * heads + torch.arange(heads, dtype=orders.dtype)).flatten()


@lru_cache(maxsize=32)
def _on_device(layout: BlockLayout, device: torch.device) -> BlockLayout:
    """Made outside of inference mode, as below: a backward may later save these very tensors."""
    with torch.inference_mode(False):
        return layout.to(device)


@lru_cache(maxsize=32)
def _head_to_layout(followed: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(followed, dtype=torch.int32, device=device)


@lru_cache(maxsize=32)
def _lengths(valid: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(valid, dtype=torch.int32, device=device)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, valid: tuple[int, ...] | None) -> Tensor:
    """SDPA, never with a mask, which would cost it its fused kernels: padding is cut off and comes
    back as zeros."""
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
