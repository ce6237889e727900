"""Changes to transformer blocks around attention: chunked MLPs, fused norms.

The modules here take the place of stock ones inside a transformer and hold the same parameters
under the same names, so that adapters and state dicts do not see a difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.values import ConfigError
from .names import ModelNames


@dataclass(frozen=True)
class BlockAdapter(ABC):
    """Changes how a family's blocks compute, not what they compute.

    fuses_modulation: True if the norms of the blocks can be fused with their scale and shift.
    """

    names: ModelNames

    fuses_modulation: ClassVar[bool] = False

    @abstractmethod
    def chunk_mlp(self, transformer: Any, tokens: int) -> None:
        """Let each block's MLP take `tokens` tokens of the video at a time; see `chunked`."""

    def fuse_modulation(self, transformer: Any, fused: bool) -> None:
        """Compute each block's norms with scale and shift, and its gated sums, in one pass over the
        video each; False puts the stock modules back.

        Outputs are rounded as those of the stock modules; gradients are rounded once. Families
        with `fuses_modulation` override this.
        """
        self.check_modulation(fused)

    def check_modulation(self, fused: bool) -> None:
        """Raise ConfigError if fused modulation is asked of a family that does not have it."""
        if fused and not self.fuses_modulation:
            raise ConfigError(
                f"speed.fused_modulation=true: family={self.names.family} has no norms of blocks "
                "to fuse. Set it to false."
            )


def chunked(function: Callable[..., Tensor], tokens: int, *inputs: Tensor) -> Tensor:
    """Compute `function(*inputs)` in chunks of `tokens` tokens of `[B, S, C]`.

    The function must treat every token alike. What is wide inside of it is never held for a whole
    video: backward runs each chunk's forward again. Within a checkpointed block that is the third
    time, after the forward and the block's recomputation.
    """
    parts = zip(*(x.split(tokens, dim=1) for x in inputs), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts], dim=1)


class ChunkedFeedForward(nn.Module):
    """diffusers' `FeedForward`, chunked; it adopts the stock module's `net`."""

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


class Replacement(nn.Module):
    """Computes what a stock module does, with that module's submodules, parameters and mode.

    It shares the stock module's registries. Hooks stay with the module that they were put on.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters = stock._modules, stock._parameters
        self.training = stock.training
        self.replaced = (stock,)  # in a tuple, or it would be a submodule


def restore(module: Any) -> Any:
    """Return the stock module that a replacement stands for; any other module is returned as is."""
    if not isinstance(module, Replacement):
        return module
    (stock,) = module.replaced
    stock.training = module.training
    return stock
