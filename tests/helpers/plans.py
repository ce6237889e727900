"""Jobs of the recipes, as their plans are tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Memory
from longreel.trainer.job import Job
from longreel.trainer.plan import rates

H200 = rates.GPUS["h200"]

# Of the recipes when most of what the tests hold plans to was measured.
AS_MEASURED = {"lora.compute_dtype": "float32", "speed.fused_norms": "false"}


def job_of(
    recipe: str, *settings: str, memory: Memory | None = None, cache: Path | None = None
) -> Job:
    """Return a job of a published model, without its files. memory: in place of the recipe's."""
    where = [] if cache is None else [f"cache.dir={cache}"]
    given = AS_MEASURED | dict(setting.split("=") for setting in settings)
    config = load([f"recipe={recipe}", *where, *(f"{k}={v}" for k, v in given.items())])
    if memory is not None:
        config = replace(config, memory=memory)
    return Job.from_config(config, published=True)
