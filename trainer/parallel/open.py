"""Which engine a run gets: what the config asks for, and what the launcher was configured for."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs

from ..config.checks import engine_problems
from ..config.schema import Config, EngineName
from ..config.values import ConfigError
from .engine import Engine, Fsdp2Engine


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
