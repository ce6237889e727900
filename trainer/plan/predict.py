"""Predict what a training run takes, before anything is loaded: no GPU, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...sparse.grid import TokenGrid
from ..config.schema import Config
from ..job import Job
from ..parallel.sequence import check_sequence
from .anatomy import Anatomy, anatomy
from .estimate import GIB, Knobs, MemoryUse, cache_bytes, read_knobs, training_memory
from .rates import MEMORY_ERROR, Gpu
from .timing import (
    Flops,
    Passes,
    Seconds,
    exchanged_bytes,
    seconds,
    sharding_bytes,
    work,
)


@dataclass(frozen=True)
class ResourcePlan:
    """The predicted resources of a training run on GPUs of one kind.

    densities: computed share of token pairs, by layer.
    flops: operations of one update, of one GPU or of the GPUs that share a sample.
    memory: peak bytes of a step; memory_limit: bytes of one GPU.
    seconds: of one update; dense_seconds: of one update if all attention were dense.
    gpus: of the run. samples: of one update, over all GPUs.
    exchanged: bytes that one GPU sends per update to the GPUs that share its samples.
    gathered: bytes of a sharded base that one GPU receives per update.
    gpu_hours: of the whole run. clip_bytes, caption_bytes: size of one on disk.
    """

    model: Anatomy
    grid: TokenGrid
    densities: list[float]
    flops: Flops
    memory: MemoryUse
    seconds: Seconds
    memory_limit: float
    gpus: int
    samples: int
    exchanged: float
    gathered: float
    gpu_hours: float
    dense_seconds: float
    clip_bytes: int
    caption_bytes: int

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory_limit

    @property
    def verdict(self) -> str:
        """Return `fits`, `does not fit`, or a text for peaks within the prediction's error."""
        if fits_surely(self.memory, self.memory_limit):
            return "fits"
        return f"may fit, by less than {MEMORY_ERROR:.0%}" if self.fits else "does not fit"


def fits_surely(memory: MemoryUse, limit: float) -> bool:
    """Return whether the peak is below `limit` bytes by more than the prediction's error."""
    return memory.peak * (1 + MEMORY_ERROR) <= limit


def plan(
    job: Job, gpu: Gpu, *, gpus: int | None = None, memory: float | None = None
) -> ResourcePlan:
    """Predict the resources of a job's run.

    gpus: of the run; None for those that share one sample. memory: GiB of one GPU; None for that of
    `gpu`. Raises ConfigError for missing model files, and for a number of GPUs that
    `parallel.sequence` does not divide.
    """
    config = job.config
    gpus = config.parallel.sequence if gpus is None else gpus
    check_sequence(config.parallel.sequence, job.geometry.heads, gpus)
    model, knobs = anatomy(job), read_knobs(config, gpus)
    grid, train = job.grid(job.frames), config.train
    densities = job.attention().layer_densities(grid, job.geometry.layers, job.geometry.heads)
    passes = Passes.of_training(knobs)
    spent = update_seconds(config, model, grid, densities, knobs, gpu)
    dense = update_seconds(config, model, grid, [1.0] * len(densities), knobs, gpu)
    clip_bytes, caption_bytes = cache_bytes(job, model)
    return ResourcePlan(
        model=model,
        grid=grid,
        densities=densities,
        flops=work(
            model, grid, densities, knobs, passes, train.batch * train.gradient_accumulation
        ),
        memory=training_memory(model, train.batch * len(grid), knobs),
        exchanged=train.gradient_accumulation
        * exchanged_bytes(model, train.batch * len(grid), knobs, passes),
        gathered=train.gradient_accumulation * sharding_bytes(model, knobs, passes),
        seconds=spent,
        dense_seconds=dense.total,
        memory_limit=GIB * (gpu.memory if memory is None else memory),
        gpus=gpus,
        samples=train.batch * train.gradient_accumulation * gpus // knobs.sequence,
        gpu_hours=train.steps * spent.total * gpus / 3600,
        clip_bytes=clip_bytes,
        caption_bytes=caption_bytes,
    )


def update_seconds(
    config: Config,
    model: Anatomy,
    grid: TokenGrid,
    densities: list[float],
    knobs: Knobs,
    gpu: Gpu,
) -> Seconds:
    """Return the seconds of one update. densities: computed share of token pairs, by layer."""
    timed = seconds(
        model,
        grid,
        densities,
        knobs,
        gpu,
        Passes.of_training(knobs),
        batch=config.train.batch,
        backend=config.sparse.backend,
    )
    return timed.times(config.train.gradient_accumulation)


def longest_frames(job: Job, fits: Callable[[int], bool]) -> int | None:
    """Return the greatest legal number of frames for which `fits(tokens)`; None if there is none.

    fits: takes the tokens of one sample, text included; must stay False once it is False, for the
    search is a bisection.
    """
    step, geometry = job.geometry.frame_step, job.geometry
    most = 2**16  # frame steps: days of video
    if geometry.max_positions is not None:
        last = (geometry.max_positions * geometry.patch[0] - 1) * geometry.temporal
        most = last // step

    def holds(steps: int) -> bool:
        return fits(len(job.grid(steps * step + 1)))

    if not holds(0):
        return None
    low, high = 0, most + 1  # low holds; high fails or is past the end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * step + 1


def longest_training(job: Job, model: Anatomy, limit: float, knobs: Knobs) -> int | None:
    """Return the frames of the longest clip that trains in `limit` bytes; None if none does.

    The result may be below the native length, where no run trains.
    """
    batch = job.config.train.batch
    return longest_frames(
        job, lambda tokens: training_memory(model, batch * tokens, knobs).peak <= limit
    )


def predicted_memory(job: Job, model: Anatomy, gpus: int | None = None) -> MemoryUse:
    """Return the memory of a step of the job. gpus: of the run; None for those of one sample."""
    tokens = job.config.train.batch * len(job.grid(job.frames))
    return training_memory(model, tokens, read_knobs(job.config, gpus))
