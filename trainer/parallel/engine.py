"""Engines hold and update a model among the processes of a run: whole in each, or in shards.

All engines let gradients be checked before an update is made, and gather whole tensors for
checkpoints, whatever the number of processes.
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
    """A model that is whole in every process: DistributedDataParallel, or a single process.

    model: the module to call. transformer: the model without wrappers. parameters: those that
    train, by name. optimizer: their torch optimizer.
    sharded: True if a forward, gathering a state and restoring one need all processes.
    supports_trial_step: True if a step can be tried and undone.
    """

    sharded, supports_trial_step = False, True

    def __init__(
        self, accelerator: Accelerator, transformer: nn.Module, build: BuildOptimizer
    ) -> None:
        """Take over a model on the CPU, and build the optimizer of its trainable parameters."""
        self.accelerator = accelerator
        self.model, self.transformer, self.optimizer = self._wrap(transformer, build)
        self.parameters = trainable(self.transformer)

    def _wrap(
        self, transformer: nn.Module, build: BuildOptimizer
    ) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
        """Return the module to call, the model without wrappers, and the optimizer."""
        optimizer = build(trainable(transformer).values())
        prepared: Any = self.accelerator.prepare(transformer, optimizer)
        model, wrapped = prepared
        return model, self.accelerator.unwrap_model(model), wrapped.optimizer

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @contextlib.contextmanager
    def batch(self, *, last: bool) -> Iterator[None]:
        """Wrap forward and backward of one batch; gradients are exchanged in the last."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Run backward, within `batch`. loss: the batch's share of the update's loss."""
        self.accelerator.backward(loss)

    def clip(self, limit: float) -> Tensor:
        """Scale gradients down to a norm of at most `limit`; return the norm before.

        All processes get the same norm.
        """
        norm: Any = self.accelerator.clip_grad_norm_([*self.parameters.values()], limit)
        return checkpoint.whole(norm)

    def step(self) -> None:
        """Update the parameters, and drop the gradients."""
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Drop the gradients without an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def gather(self) -> checkpoint.State:
        """Return parameters and moments, whole and on the CPU.

        Processes other than the main one get a state without tensors. All processes must call it if
        the engine is sharded.
        """
        keep = self.accelerator.is_main_process
        return checkpoint.gather(self.parameters, self.optimizer, keep=keep)

    def restore(self, state: checkpoint.State) -> None:
        """Undo `gather`. Raises ValueError for the moments of another optimizer."""
        checkpoint.scatter(state, self.parameters, self.optimizer)


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}
