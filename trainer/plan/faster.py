"""What would make a planned run faster: settings that cost nothing, or memory that is left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config.checks import problems
from ..config.schema import Config
from ..job import Job
from .anatomy import Anatomy, anatomy
from .estimate import MemoryUse, read_knobs, training_memory
from .predict import Plan, fits_surely, told, turned_to, update_seconds
from .rates import Gpu

# Settings turned together, what costs least memory first.
FASTER: tuple[dict[str, Any], ...] = (
    {"speed.fused_norms": True},
    {"lora.compute_dtype": "bfloat16"},
    {"memory.recompute": "all_but_attention"},
    {"memory.recompute": "all_but_attention", "memory.offload": True},
)
WORTH = 0.01  # of the time: less is within the error of the prediction


@dataclass(frozen=True)
class Faster:
    """settings: as typed. seconds: of an update, and memory of a step, as then predicted."""

    settings: list[str]
    seconds: float
    memory: MemoryUse


def faster(job: Job, made: Plan, gpu: Gpu) -> Faster | None:
    """The settings of FASTER that each make the planned run faster, and leave it fitting or with
    a lower peak than it has; None if none does.

    Where offloaded blocks would take more of the host than the run takes, as many stay on the GPU
    as it holds; in the end the host may have to give as much as a GPU has, or as the run takes. How
    much it has is not known here.
    """
    models = {job.config.speed.fused_norms: made.model}  # what is kept of a norm depends on it
    taken, layers = made.memory.host_peak, job.geometry.layers
    turned, best, found = job.config, Faster([], made.seconds.total, made.memory), {}

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
        tried, changed = turned, dict(settings)
        for setting, value in settings.items():
            tried = turned_to(tried, setting, value)
        if any(problems(tried)) or not fits(tried):
            continue
        while memory(tried).host_peak > taken and tried.memory.offload_keep < layers:
            keep = tried.memory.offload_keep + 1
            more = turned_to(tried, "memory.offload_keep", keep)
            if not fits(more):
                break
            tried, changed["memory.offload_keep"] = more, keep
        room = memory(tried).host_peak <= max(taken, made.memory_limit)
        if room and (spent := seconds(tried)) <= (1 - WORTH) * best.seconds:
            turned, best = tried, Faster([], spent, memory(tried))
            found |= changed
    if not found:
        return None
    return replace(best, settings=[told(setting, value) for setting, value in found.items()])
