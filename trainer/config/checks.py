"""Which settings a run cannot have: values out of range, and settings that exclude each other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from ...kernels.block_sparse.op import BLOCKS
from .fields import out_of_range
from .schema import Config, Data
from .values import ConfigError, flatten, not_finite


def check(config: Config) -> None:
    """Raise ConfigError for all settings that no model takes, at once.

    What depends on the model is checked by its family.
    """
    found = list(problems(config))
    if found:
        raise ConfigError("\n".join(found))


def problems(config: Config) -> Iterator[str]:
    """Yield a sentence for each thing that `check` refuses."""
    values = flatten(dataclasses.asdict(config))
    yield from not_finite(values)
    yield from out_of_range(Config, values)
    yield from _attention_problems(config)
    yield from _memory_problems(config)
    yield from engine_problems(config)
    if config.frames is None and config.extend.factor is None:
        yield (
            "Neither frames nor extend.factor is set: give the length to train at, e.g. "
            "extend.factor=2."
        )
    train, validate = config.train, config.validate
    if train.warmup > train.steps:
        yield f"train.warmup={train.warmup} is more than train.steps={train.steps}."
    yield from _data_problems(config.data)
    if validate.videos and not validate.sigmas:
        yield "validate.sigmas is empty: name noise levels, or hold none out (validate.videos=0)."


def _attention_problems(config: Config) -> Iterator[str]:
    block, rope = config.sparse.block, config.rope
    if block > 0 and block not in BLOCKS:
        yield f"sparse.block={block} must be 16, 32, 64 or 128; the kernels are tuned for 128."
    if rope.k is not None and rope.policy != "riflex":
        yield f"rope.k={rope.k} applies to rope.policy=riflex only, not to {rope.policy}."


def _memory_problems(config: Config) -> Iterator[str]:
    memory = config.memory
    if memory.offload and memory.recompute == "none":
        yield (
            "memory.offload=true moves what recomputed blocks keep: it needs "
            "memory.recompute=all or all_but_attention."
        )
    if memory.recompute == "all_but_attention" and config.sparse.backend == "flex":
        yield (
            "memory.recompute=all_but_attention keeps the results of our kernels and of SDPA, and "
            "sparse.backend=flex is neither: use memory.recompute=all, or another backend."
        )
    if config.lora.compute_dtype == "bfloat16" and memory.base_dtype == "float32":
        yield (
            "lora.compute_dtype=bfloat16 needs a base of bfloat16 or float8, not "
            "memory.base_dtype=float32."
        )


def engine_problems(config: Config) -> Iterator[str]:
    """Yield a sentence for each setting that `parallel.engine` does not support."""
    sharded = config.parallel.engine not in (None, "ddp")
    if sharded and config.train.optimizer == "adamw8bit":
        yield (
            f"parallel.engine={config.parallel.engine} shards the moments, which "
            "train.optimizer=adamw8bit keeps in blocks of its own: use train.optimizer=adamw, or "
            "parallel.engine=ddp."
        )
    if config.parallel.engine == "zero3" and config.memory.base_dtype == "float8":
        yield (
            "parallel.engine=zero3 does not support float8 weights: use fsdp2, or another "
            "memory.base_dtype."
        )


def _data_problems(data: Data) -> Iterator[str]:
    if (data.top_k is None) != (data.top_by is None):
        given, missing = ("top_k", "top_by") if data.top_by is None else ("top_by", "top_k")
        yield f"data.{given} is set and data.{missing} is not: they work together."
    yield from (
        f"data.aspects: {text} is not of the form WIDTH:HEIGHT, such as 16:9."
        for text in data.aspects
        if not re.fullmatch(r"0*[1-9]\d*:0*[1-9]\d*", text)
    )
