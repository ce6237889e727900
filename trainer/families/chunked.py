"""MLPs over some tokens at a time: what is wide inside of them is never held for a whole video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def chunked(function: Callable[..., Tensor], tokens: int, *inputs: Tensor) -> Tensor:
    """`function(*inputs)` for one that treats every token of `[B, S, C]` alike, `tokens` at a time.

    Backward runs each chunk's forward again. Within a checkpointed block that is a third time:
    once in the forward, once when the block is recomputed, once here.
    """
    parts = zip(*(x.split(tokens, dim=1) for x in inputs), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts], dim=1)


class ChunkedFeedForward(nn.Module):
    """diffusers' `FeedForward` over some tokens at a time; it adopts the stock one's `net`."""

    def __init__(self, stock: Any, tokens: int) -> None:
        super().__init__()
        self.net = stock.net
        self.tokens = tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        return chunked(self._whole, self.tokens, hidden_states)

    def _whole(self, hidden_states: Tensor) -> Tensor:
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states
