"""Activation checkpointing of a transformer's blocks, by the settings `memory.*`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ...sparse.attention import SparseAttention
from ..config.schema import Memory
from .keep_attention import Keep, keeping_attention, kept_on_device
from .offload import Offload


@dataclass(eq=False)
class BlockCheckpoint:
    """Activation checkpointing of blocks, to pass to diffusers' `enable_gradient_checkpointing`.

    A block keeps only its inputs. Its backward first runs its forward again, with the same
    attention plan and random numbers, so gradients are the same to the bit.

    keep_attention: keep the output of self-attention too (per block, the size of its input and 4
        bytes per token and head) instead of recomputing it.
    offload: moves the kept tensors to host memory; None leaves them on the device.
    """

    attention: SparseAttention
    keep_attention: bool = False
    offload: Offload | None = None

    def __call__(self, block: Callable[..., object], *args: object) -> object:
        if self.offload is None:
            return self._run(kept_on_device, block, *args)
        with self.offload.block() as stored:
            return self._run(stored.keep, block, *args)

    def _run(self, keep: Keep, block: Callable[..., object], *args: object) -> object:
        if not self.keep_attention:
            return self.attention.recomputing(block, *args)
        contexts = partial(keeping_attention, keep)
        return self.attention.recomputing(block, *args, context_fn=contexts)


def block_checkpoint(
    memory: Memory, attention: SparseAttention, device: torch.device
) -> BlockCheckpoint | None:
    """Return the checkpointing that the settings ask for; None for none."""
    if memory.recompute == "none":
        return None
    offload = Offload(device, keep=memory.offload_keep) if memory.offload else None
    return BlockCheckpoint(attention, memory.recompute == "all_but_attention", offload)
