"""How the processes of a run hold a model and update it: whole in each, or in shards.

What is ours is that gradients are checked before an update is made, and that checkpoints hold whole
tensors, whatever the engine and the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..run import checkpoint

BuildOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Engine:
    """A model that is whole in every process: DistributedDataParallel, or one process alone.

    sharded: whether a forward, gathering a state or restoring one needs all processes. probes:
    whether a step can be tried and thrown away.
    """

    sharded, probes = False, True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(self, transformer: nn.Module, build: BuildOptimizer) -> None:
        """Take over a model on the CPU, and build its optimizer; sets the attributes named below.

        model: what is called. transformer: it without wrappers. parameters: those that train, by
        name. optimizer: their torch optimizer.
        """
        optimizer = build(trainable(transformer).values())
        prepared: Any = self.accelerator.prepare(transformer, optimizer)
        self.model, wrapped = prepared
        self.optimizer: torch.optim.Optimizer = wrapped.optimizer
        self.transformer: nn.Module = self.accelerator.unwrap_model(self.model)
        self.parameters = trainable(self.transformer)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one batch; processes exchange gradients in the last."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Within `batch`. loss: a part of the update's."""
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to a norm of `limit`; the norm before, the same everywhere."""
        norm: Any = self.accelerator.clip_grad_norm_([*self.parameters.values()], limit)
        return checkpoint.whole(norm)

    def step(self) -> None:
        """Make the update, and forget the gradients."""
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gather(self) -> checkpoint.State:
        """Parameters and moments, whole and on the CPU; without tensors in other processes than the
        main one. All processes call it where these are sharded."""
        keep = self.accelerator.is_main_process
        return checkpoint.gather(self.parameters, self.optimizer, keep=keep)

    def restore(self, state: checkpoint.State) -> None:
        """The inverse of `gather`. Raises ValueError for the moments of another optimizer."""
        checkpoint.scatter(state, self.parameters, self.optimizer)


class Fsdp2Engine(Engine):
    """PyTorch's `fully_shard`: parameters in shards, those of a block gathered while it computes.

    Called here and not through accelerate, which (1.15) shards on GPUs alone: what cannot be tested
    without them. Parameters keep their dtypes; a gradient is reduced in its own, fp32.
    """

    sharded = True

    def prepare(self, transformer: nn.Module, build: BuildOptimizer) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for block in blocks_of(transformer):
            fully_shard(block, mesh=mesh)
        self.model: Any = fully_shard(transformer, mesh=mesh)
        self.transformer, self.parameters = transformer, trainable(transformer)
        self.optimizer = build(self.parameters.values())

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, limit: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return checkpoint.whole(norm)


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """A transformer's blocks: what its top-level lists hold."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
