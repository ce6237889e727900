"""How the processes of a run hold a model and update it: whole in each, or in shards.

What is ours is that gradients are checked before an update is made, and that checkpoints hold whole
tensors, whatever the engine and the number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from ..config.schema import Config, ConfigError, EngineName, engine_problems
from ..run import checkpoint

BuildOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def launched_engine() -> EngineName | None:
    """What `accelerate launch` was configured for; None for processes alone."""
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        raise ConfigError(
            "accelerate is configured with a DeepSpeed file of its own, which is not read: name "
            "zero_stage alone, as launch/zero2.yaml and launch/zero3.yaml do."
        )
    # ACCELERATE_USE_DEEPSPEED says less: accelerate itself sets it for a plugin it is given.
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage is not None:
        engines: dict[str, EngineName] = {"2": "zero2", "3": "zero3"}
        if stage not in engines:
            raise ConfigError(
                f"accelerate is configured for ZeRO stage {stage}; parallel.engine knows zero2 and "
                "zero3, and ddp does what stages 0 and 1 do for a LoRA."
            )
        return engines[stage]
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "accelerate is configured for the first version of FSDP: set fsdp_version: 2, as "
                "launch/fsdp2.yaml does."
            )
        return "fsdp2"
    return None


def open_engine(config: Config, timeout: timedelta) -> Engine:
    """The engine that the config asks for, or else the launcher; starts the process group.

    timeout: of collectives. Raises ConfigError where config and launcher differ, for what the
    engine cannot do, and where accelerate knows nothing of the other processes.
    """
    engine = _open(config, timeout)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    known = dist.get_world_size() if dist.is_initialized() else 1
    if started != known:  # each would train a run of its own, in the same folder
        raise ConfigError(
            f"{started} processes were started and accelerate knows of {known}: it takes each that "
            "finds no GPU for one alone. On CPUs set ACCELERATE_USE_CPU=true."
        )
    return engine


def _open(config: Config, timeout: timedelta) -> Engine:
    wanted, launched = config.parallel.engine, launched_engine()
    if wanted is not None and launched is not None and wanted != launched:
        raise ConfigError(
            f"parallel.engine={wanted}, but accelerate was launched for {launched}: leave the "
            "setting out, or launch with another --config_file."
        )
    name = wanted or launched or "ddp"
    check_engine(name, config)
    handlers: Any = [InitProcessGroupKwargs(timeout=timeout)]
    if name == "ddp":
        return Engine(Accelerator(mixed_precision="no", kwargs_handlers=handlers))
    if name == "fsdp2":
        return Fsdp2Engine(Accelerator(mixed_precision="no", kwargs_handlers=handlers))
    from .zero import open_zero

    return open_zero(name, config, handlers)


def check_engine(name: EngineName, config: Config) -> None:
    """Raise ConfigError for settings that do not go with an engine, and for what is missing."""
    chosen = replace(config, parallel=replace(config.parallel, engine=name))
    if found := list(engine_problems(chosen)):
        raise ConfigError("\n".join(found))
    if name.startswith("zero") and find_spec("deepspeed") is None:
        raise ConfigError(
            f"parallel.engine={name} needs the package deepspeed: install it with `pip install "
            "'longreel[deepspeed]'`, or use fsdp2, which shards as much as zero3."
        )


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
