"""Attention as a model's layers call it: sparse by a plan, dense where the recipe says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.block_sparse import block_sparse_attention
from ..kernels.block_sparse.op import Backend
from .grid import TokenGrid
from .layout import BlockLayout, build_layout
from .patterns import Dense, SparsePattern


@dataclass(frozen=True, eq=False)
class Plan:
    """What one forward of the model computes: set before it, the same for all of its layers."""

    grid: TokenGrid
    valid: Tensor | None  # [batch] int32, keys at or past it are padding
    dense: bool  # a dense diffusion step


@dataclass(eq=False)
class SparseAttention:
    """The self-attention of one model.

    pattern: which tokens attend to which. `Dense` means SDPA in every layer.
    block: tokens of a block, a power of two; the kernels are tuned for 128.
    backend: of `block_sparse_attention`.
    dense_layers: a number k for the first k layers, or the indices of the layers that stay dense.
    dense_steps: the first diffusion steps that stay dense when sampling.
    schedule: set while sampling; turns the model's timestep into the `step` of `plan`. By value,
        because guidance calls the model twice a step.
    """

    pattern: SparsePattern
    block: int = 128
    backend: Backend = "auto"
    dense_layers: int | Collection[int] = 0
    dense_steps: int = 0
    schedule: Callable[[Tensor], int] | None = None
    _plan: Plan | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, int):
            self.dense_layers = range(self.dense_layers)
        self.dense_layers = frozenset(self.dense_layers)

    def plan(
        self, grid: TokenGrid, *, valid: Tensor | None = None, step: int | None = None
    ) -> None:
        """Set the geometry of the coming forward; every layer then calls `attention`.

        valid: `[batch]` int32, how many of the sequence's tokens count as keys; the rest is padded
            text. None when nothing is padded.
        step: index of the diffusion step when sampling, None when training.
        """
        self._plan = self.planned(grid, valid=valid, step=step)

    def planned(
        self, grid: TokenGrid, *, valid: Tensor | None = None, step: int | None = None
    ) -> Plan:
        """The plan that `plan` would set, for `using`."""
        return Plan(grid, valid, step is not None and step < self.dense_steps)

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

    def checkpoint(self, function: Callable[..., object], *args: object) -> object:
        """Gradient checkpointing of one block that recomputes under the plan its forward saw.

        Pass it to a diffusers model's `enable_gradient_checkpointing`. Another forward may set
        another plan before this one's backward runs.
        """
        plan = self._plan

        def under_plan(*args: object) -> object:
            with self.using(plan):
                return function(*args)

        return checkpoint(under_plan, *args, use_reentrant=False)

    def is_dense(self, layer_index: int, plan: Plan | None = None) -> bool:
        """Whether a layer runs dense attention under `plan` (without one: in a sparse step)."""
        assert not isinstance(self.dense_layers, int)
        dense_step = plan is not None and plan.dense
        return dense_step or isinstance(self.pattern, Dense) or layer_index in self.dense_layers

    def layout(self, grid: TokenGrid) -> BlockLayout:
        """The block layout of `grid`, on the CPU."""
        return build_layout(self.pattern, grid, self.block)

    def token_density(self, grid: TokenGrid, layers: int) -> float:
        """Executed share of all token pairs over `layers` layers, text and dense layers counted."""
        sparse = self.layout(grid).token_density(len(grid))
        return sum(1.0 if self.is_dense(i) else sparse for i in range(layers)) / layers

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; q, k, v and the result are `[batch, tokens, heads, head_dim]`."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("SparseAttention.plan must be called before the model's forward.")
        if len(plan.grid) != q.shape[1]:
            raise ValueError(f"{q.shape[1]} tokens were given, but the plan is for {plan.grid}.")
        if self.is_dense(layer_index, plan):
            return _dense_attention(q, k, v, plan.valid)
        layout = _on_device(self.layout(plan.grid), q.device)
        out, _ = block_sparse_attention(
            q,
            k,
            v,
            layout.row_indptr,
            layout.row_indices,
            layout.col_indptr,
            layout.col_indices,
            _first_layout(q.shape[2], q.device),
            block=self.block,
            valid=plan.valid,
            backend=self.backend,
        )
        return out


@lru_cache(maxsize=32)
def _on_device(layout: BlockLayout, device: torch.device) -> BlockLayout:
    """Made outside of inference mode, as below: a backward may later save these very tensors."""
    with torch.inference_mode(False):
        return layout.to(device)


@lru_cache(maxsize=32)
def _first_layout(heads: int, device: torch.device) -> Tensor:
    """Every head follows the one layout."""
    with torch.inference_mode(False):
        return torch.zeros(heads, dtype=torch.int32, device=device)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    mask = None
    if valid is not None:
        mask = torch.arange(k.shape[1], device=k.device) < valid[:, None]
        mask = mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
