"""Open the processes of a run, under the engine that the config or the launcher asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from ..config.checks import engine_problems
from ..config.schema import Config, EngineName
from ..config.values import ConfigError
from .engine import Engine
from .fsdp2 import Fsdp2Engine
from .sequence import SequenceGroup


def launched_engine() -> EngineName | None:
    """Return the engine that `accelerate launch` was configured for; None if it names none.

    Raises ConfigError for configurations that are not supported.
    """
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        raise ConfigError(
            "accelerate is configured with a DeepSpeed file of its own, which is not read: set "
            "only zero_stage, as launch/zero2.yaml and launch/zero3.yaml do."
        )
    # Not ACCELERATE_USE_DEEPSPEED, which accelerate also sets itself when given a plugin.
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage is not None:
        engines: dict[str, EngineName] = {"2": "zero2", "3": "zero3"}
        if stage not in engines:
            raise ConfigError(
                f"accelerate is configured for ZeRO stage {stage}; parallel.engine supports zero2 "
                "and zero3. For a LoRA, ddp replaces stages 0 and 1."
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


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and this process's place among them.

    engine: how they hold the model. accelerator: has started their process group. sequence: those
    that share this process's clips.
    """

    engine: type[Engine]
    accelerator: Accelerator
    sequence: SequenceGroup

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def wait(self) -> None:
        """Wait until all processes have come to this call."""
        self.accelerator.wait_for_everyone()


def open_processes(config: Config, heads: int, timeout: timedelta) -> Processes:
    """Start the process group and the groups that share clips; all processes must call it.

    heads: of the model. timeout: of collectives. Raises ConfigError as `open_engine` does, and for
    a `parallel.sequence` that does not divide the heads and the number of processes.
    """
    engine, accelerator = open_engine(config, timeout)
    sequence = SequenceGroup.create(config.parallel.sequence, heads, timeout)
    return Processes(engine, accelerator, sequence)


def open_engine(config: Config, timeout: timedelta) -> tuple[type[Engine], Accelerator]:
    """Return the engine that the config, or else the launcher, asks for; start the process group.

    timeout: of collectives. Raises ConfigError if config and launcher disagree, for settings that
    the engine does not support, and if accelerate does not know of the other processes.
    """
    name = _engine_name(config)
    check_engine(name, config)
    engine, accelerator = _open(name, config, timeout)
    started, known = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if started != known:  # each would train a run of its own, in the same folder
        if name.startswith("zero"):
            raise ConfigError("The engines zero2 and zero3 need GPUs: on CPUs use fsdp2.")
        raise ConfigError(
            f"{started} processes were started and accelerate knows of {known}: it takes a process "
            "that finds no GPU for a run of its own. On CPUs set ACCELERATE_USE_CPU=true."
        )
    return engine, accelerator


def _engine_name(config: Config) -> EngineName:
    wanted, launched = config.parallel.engine, launched_engine()
    if wanted is not None and launched is not None and wanted != launched:
        raise ConfigError(
            f"parallel.engine={wanted}, but accelerate was launched for {launched}: remove the "
            "setting, or launch with another --config_file."
        )
    return wanted or launched or "ddp"


def _open(name: EngineName, config: Config, timeout: timedelta) -> tuple[type[Engine], Accelerator]:
    handlers: Any = [InitProcessGroupKwargs(timeout=timeout)]
    if name == "ddp":
        return Engine, Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    if name == "fsdp2":
        return Fsdp2Engine, Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    from .zero import ZeroEngine, open_zero

    return ZeroEngine, open_zero(name, config, handlers)


def check_engine(name: EngineName, config: Config) -> None:
    """Raise ConfigError for settings that an engine does not support, or a missing package."""
    chosen = replace(config, parallel=replace(config.parallel, engine=name))
    if found := list(engine_problems(chosen)):
        raise ConfigError("\n".join(found))
    if name.startswith("zero") and find_spec("deepspeed") is None:
        raise ConfigError(
            f"parallel.engine={name} needs the package deepspeed: install it with `pip install "
            "'longreel[deepspeed]'`, or use fsdp2, which shards as much as zero3."
        )
