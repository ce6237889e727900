"""Sparse attention inside a stock transformer: processors, and a plan before every forward."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...sparse.attention import SparseAttention
from ...sparse.grid import TokenGrid


class AttentionAdapter(ABC):
    """Lets `SparseAttention` compute a family's self-attention."""

    def install(self, transformer: Any, attention: SparseAttention, fused_norms: bool) -> None:
        """Give every self-attention layer a processor, and plan the geometry of every forward from
        its inputs. This replaces what an earlier call installed.

        fused_norms: compute the norms of queries and keys with RoPE in one kernel (`norm_rope`).
        """
        for hook in list(transformer._forward_pre_hooks.values()):
            if isinstance(hook, PlanForward):
                hook.handle.remove()
        self.set_processors(transformer, attention, fused_norms)
        hook = PlanForward(self, attention)
        hook.handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)

    @abstractmethod
    def set_processors(
        self, transformer: Any, attention: SparseAttention, fused_norms: bool
    ) -> None:
        """Give every self-attention layer its processor, numbered in the order that layers run."""

    @abstractmethod
    def sequence(
        self, transformer: Any, inputs: Mapping[str, Any]
    ) -> tuple[TokenGrid, Sequence[int] | None]:
        """Return the grid of one forward, and the number of valid tokens of each sample.

        The number is None if all tokens are valid. inputs: arguments of `transformer.forward` by
        name.
        """


class PlanForward:
    """Forward pre-hook of a transformer that plans its attention from the inputs of the forward."""

    handle: Any

    def __init__(self, adapter: AttentionAdapter, attention: SparseAttention) -> None:
        self.adapter = adapter
        self.attention = attention

    def __call__(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(type(transformer).forward)
        inputs = signature.bind(transformer, *args, **kwargs).arguments
        grid, valid = self.adapter.sequence(transformer, inputs)
        schedule = self.attention.schedule
        step = None if schedule is None else schedule(inputs["timestep"])
        self.attention.plan(grid, valid=valid, step=step)


def installed_attention(transformer: Any) -> SparseAttention | None:
    """Return the attention that `ModelFamily.install` put into a transformer; None for a stock
    one."""
    hooks = transformer._forward_pre_hooks.values()
    return next((hook.attention for hook in hooks if isinstance(hook, PlanForward)), None)


@dataclass(eq=False)
class LayerProcessor:
    """Attention processor of one layer: the stock arithmetic around `SparseAttention`.

    layer_index: counts layers in the order that they run. fused_norms: compute norms and RoPE by
    `norm_rope`.
    """

    layer_index: int
    attention: SparseAttention
    fused_norms: bool
