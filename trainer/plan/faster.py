"""Settings that would make a planned run faster, and cost nothing or only memory that is left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config.checks import problems
from ..config.schema import Config
from ..job import Job
from .advice import as_argument, with_setting
from .anatomy import Anatomy, anatomy
from .estimate import MemoryUse, read_knobs, training_memory
from .predict import ResourcePlan, fits_surely, update_seconds
from .rates import Gpu

# Settings that are changed together, those that cost the least memory first.
FASTER: tuple[dict[str, Any], ...] = (
    {"speed.fused_norms": True},
    {"lora.compute_dtype": "bfloat16"},
    {"memory.recompute": "all_but_attention"},
    {"memory.recompute": "all_but_attention", "memory.offload": True},
)
WORTH = 0.01  # smallest share of the time to gain: less is within the prediction's error


@dataclass(frozen=True)
class Faster:
    """Faster settings, as `key=value`, and with them the predicted update time and step memory."""

    settings: list[str]
    seconds: float
    memory: MemoryUse


def faster(job: Job, made: ResourcePlan, gpu: Gpu) -> Faster | None:
    """Return the settings of FASTER that make the planned run faster; None if none does.

    Each must gain time by itself, and leave the run fitting or its peak no higher than before.

    Offloaded blocks may need more host memory than the run takes anyway. Then as many blocks stay
    on the GPU as fit, and the host may be asked for as much memory as a GPU has: how much it
    really has is not known here.
    """
    models = {job.config.speed.fused_norms: made.model}  # fused norms keep less for backward
    taken, layers = made.memory.host_peak, job.geometry.layers
    chosen, best, found = job.config, Faster([], made.seconds.total, made.memory), {}

    def model(config: Config) -> Anatomy:
        fused = config.speed.fused_norms
        if fused not in models:
            models[fused] = anatomy(replace(job, config=config))
        return models[fused]

    def memory(config: Config) -> MemoryUse:
        tokens, knobs = config.train.batch * len(made.grid), read_knobs(config, made.gpus)
        return training_memory(model(config), tokens, knobs)

    def seconds(config: Config) -> float:
        knobs = read_knobs(config, made.gpus)
        return update_seconds(config, model(config), made.grid, made.densities, knobs, gpu).total

    def fits(config: Config) -> bool:
        needed = memory(config)
        return needed.peak <= best.memory.peak or fits_surely(needed, made.memory_limit)

    for settings in FASTER:
        tried, changed = chosen, dict(settings)
        for setting, value in settings.items():
            tried = with_setting(tried, setting, value)
        if any(problems(tried)) or not fits(tried):
            continue
        while memory(tried).host_peak > taken and tried.memory.offload_keep < layers:
            keep = tried.memory.offload_keep + 1
            more = with_setting(tried, "memory.offload_keep", keep)
            if not fits(more):
                break
            tried, changed["memory.offload_keep"] = more, keep
        room = memory(tried).host_peak <= max(taken, made.memory_limit)
        if room and (spent := seconds(tried)) <= (1 - WORTH) * best.seconds:
            chosen, best = tried, Faster([], spent, memory(tried))
            found |= changed
    if not found:
        return None
    return replace(best, settings=[as_argument(key, value) for key, value in found.items()])
