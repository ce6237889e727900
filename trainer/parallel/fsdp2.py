"""FSDP2: the model in shards over the processes of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..run import checkpoint
from .engine import BuildOptimizer, Engine, trainable


class Fsdp2Engine(Engine):
    """PyTorch's `fully_shard`: sharded parameters, gathered per block while it computes.

    It is called here and not through accelerate, which (1.15) shards on GPUs only and so could not
    be tested on CPUs. Parameters keep their dtypes; gradients are reduced in theirs, fp32.
    """

    sharded = True

    def _wrap(
        self, transformer: nn.Module, build: BuildOptimizer
    ) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for block in blocks_of(transformer):
            fully_shard(block, mesh=mesh)
        model = fully_shard(transformer, mesh=mesh)
        return model, transformer, build(trainable(transformer).values())

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, limit: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return checkpoint.whole(norm)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Return a transformer's blocks: the modules in its top-level lists."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
