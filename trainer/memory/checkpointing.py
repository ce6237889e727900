"""What `memory.*` does to a transformer: how its blocks keep what their backward needs."""

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
    """Gradient checkpointing of blocks: what `enable_gradient_checkpointing` of diffusers takes.

    A block keeps its inputs, and its backward first runs its forward again, under the plan and the
    random numbers of the first time. Gradients are the same to the bit.

    keep_attention: keep what self-attention returned as well (per block, the size of its input and
        4 bytes for each token and head) and do not compute it again.
    offload: where what is kept waits; None: on the device.
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
    """The checkpointing that a config asks for; None for none."""
    if memory.recompute == "none":
        return None
    offload = Offload(device, keep=memory.offload_keep) if memory.offload else None
    return BlockCheckpoint(attention, memory.recompute == "all_but_attention", offload)
