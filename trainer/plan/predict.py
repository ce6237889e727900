"""What a run will take and what would fit, before anything is loaded: no GPU, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...sparse.grid import TokenGrid
from ..config.checks import problems
from ..config.schema import Config
from ..config.values import ConfigError
from ..families.published import blank_encoders
from ..job import Job
from ..memory.float8 import is_supported
from ..parallel.sequence import check_sequence
from ..run import checkpoint
from ..run.resume import FREE_KEYS
from .anatomy import Anatomy, anatomy
from .estimate import (
    GIB,
    SAMPLING,
    Flops,
    Knobs,
    MemoryUse,
    Passes,
    Seconds,
    cache_bytes,
    decoding_bytes,
    exchanged_bytes,
    forward_memory,
    read_knobs,
    seconds,
    sharding_bytes,
    training_memory,
    work,
)
from .rates import MEMORY_ERROR, RESERVE, Gpu


@dataclass(frozen=True)
class Plan:
    """Of one training run on GPUs of one kind.

    flops: of one update of one process, or of those that share samples; seconds: likewise, and
    dense_seconds were all attention dense. memory_limit: bytes of one GPU. samples: that an update
    learns from, over all GPUs. exchanged: bytes that one GPU sends in an update to those that share
    its samples; gathered: that it receives of a base in shards. gpu_hours: of the whole run.
    clip_bytes, caption_bytes: of one on disk.
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
        """`fits`, `does not fit`, or in between, when the error of the prediction decides."""
        if fits_surely(self.memory, self.memory_limit):
            return "fits"
        return f"may fit, by less than {MEMORY_ERROR:.0%}" if self.fits else "does not fit"


def fits_surely(memory: MemoryUse, limit: float) -> bool:
    """Whether the peak is below so many bytes by more than predictions are known to err."""
    return memory.peak * (1 + MEMORY_ERROR) <= limit


def plan(job: Job, gpu: Gpu, *, gpus: int | None = None, memory: float | None = None) -> Plan:
    """gpus: None for those that share one sample. memory: GiB of one GPU, if not that of `gpu`.

    Raises ConfigError for missing model files, and if `gpus` cannot be shared as the config asks.
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
    return Plan(
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
    """Of one update, with so much of all pairs in each layer."""
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


@dataclass(frozen=True)
class SamplingPlan:
    """Of one video as `longreel sample` makes it, text encoders and transformer one after another.

    text, transformer, decoding: peak bytes by part of these three stages. forwards: of the model,
    each of `samples` at once. seconds: of all forwards; text and VAE take more.
    """

    steps: int
    forwards: int
    samples: int
    text: dict[str, float]
    transformer: dict[str, float]
    decoding: dict[str, float]
    seconds: Seconds

    @property
    def peak(self) -> float:
        return max(sum(s.values()) for s in (self.text, self.transformer, self.decoding))


def plan_sampling(job: Job, gpu: Gpu) -> SamplingPlan:
    """At the job's length, with the family's steps and guidance, on one GPU."""
    model, family, config = anatomy(job), job.family, job.config
    knobs = replace(read_knobs(config), offload=False, sequence=1, engine="ddp")
    vae, encoders = blank_encoders(family, job.model_path, config.model.revision)
    grid, attention = job.grid(job.frames), job.attention()
    negative = job.geometry.uses_negative(family.defaults.guidance)
    samples = 2 if negative and family.defaults.batches_guidance else 1
    forwards = family.defaults.steps * (1 + (negative and samples == 1))
    spent = Seconds(0, 0, 0, 0)
    layers = range(job.geometry.layers)
    sparse = attention.layer_densities(grid, len(layers), job.geometry.heads)
    for step in range(family.defaults.steps):
        dense = attention.planned(grid, step=(step, family.defaults.steps)).dense
        once = seconds(
            model,
            grid,
            [1.0] * len(layers) if dense else sparse,
            knobs,
            gpu,
            SAMPLING,
            batch=samples,
            backend=config.sparse.backend,
        )
        spent = spent.plus(once.times(forwards / family.defaults.steps))

    def weights(module: Any, component: str) -> float:
        bytes_each = 4 if component in family.loader.fp32_components else knobs.act
        return bytes_each * sum(p.numel() for p in module.parameters())

    vae_bytes, reserve = {"VAE": weights(vae, "vae")}, {"reserve": RESERVE * GIB}
    transformer = forward_memory(model, len(grid), knobs, samples)
    held = {part: transformer[part] for part in ("frozen base", "LoRA")}
    text = sum(weights(encoder, "text_encoder") for encoder in encoders)
    return SamplingPlan(
        steps=family.defaults.steps,
        forwards=forwards,
        samples=samples,
        text={"text encoders": text} | reserve,
        transformer=transformer | vae_bytes | reserve,
        decoding=held | vae_bytes | {"decoder": decoding_bytes(job)} | reserve,
        seconds=spent,
    )


def longest_frames(job: Job, fits: Callable[[int], bool]) -> int | None:
    """The greatest legal number of frames for which `fits(tokens)`, by bisection; None if none is.

    fits: of the tokens of one sample, text included; must not come back once it has failed.
    """
    step, geometry = job.geometry.frame_step, job.geometry
    most = 2**16  # of steps: days of video
    if geometry.max_positions is not None:
        last = (geometry.max_positions * geometry.patch[0] - 1) * geometry.temporal
        most = last // step

    def holds(steps: int) -> bool:
        return fits(len(job.grid(steps * step + 1)))

    if not holds(0):
        return None
    low, high = 0, most + 1  # holds, and is past the end or fails
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * step + 1


def longest_training(job: Job, model: Anatomy, limit: float, knobs: Knobs) -> int | None:
    """Frames of the longest clip that trains in `limit` bytes; it may be below the native length,
    at which no run trains."""
    batch = job.config.train.batch
    return longest_frames(
        job, lambda tokens: training_memory(model, batch * tokens, knobs).peak <= limit
    )


# What to turn when memory is short, what costs least first: the setting, and its value.
REMEDIES: tuple[tuple[str, Any], ...] = (
    ("memory.recompute", "all_but_attention"),  # in place of none, and what offload needs
    ("memory.offload", True),
    ("memory.offload_keep", 0),
    ("memory.recompute", "all"),
    ("memory.offload", True),  # where attention's result cannot be kept, so not before
    ("memory.mlp_chunk", 16384),
    ("lora.compute_dtype", "bfloat16"),
    ("train.optimizer", "adamw8bit"),
    ("parallel.engine", "fsdp2"),  # where there are several GPUs, and moments are not of 8 bits
    ("memory.base_dtype", "float8"),
)
NO_SETTING = (
    "no setting helps further; fewer frames, a smaller train.batch, or on several GPUs "
    "parallel.sequence would"
)


def remedies(
    config: Config,
    model: Anatomy,
    tokens: int,
    limit: float,
    gpus: int | None = None,
    *,
    float8: bool = True,
) -> tuple[dict[str, float], Knobs]:
    """Settings that bring a step of `tokens` under `limit` bytes, each on top of those before it,
    with the peak in bytes that it leaves; and the knobs as they then are.

    Only those that help, and that go with the settings before them, one of which may be another
    value of the same. The last one may still not be enough; a limit of 0 gives all. float8: whether
    the GPU multiplies in it.
    """
    turned: dict[str, float] = {}
    peak = training_memory(model, tokens, read_knobs(config, gpus)).peak
    for setting, value in REMEDIES:
        if peak <= limit:
            break
        if value == "float8" and not float8:
            continue
        tried = turned_to(config, setting, value)
        lower = training_memory(model, tokens, read_knobs(tried, gpus)).peak
        if lower < peak and not any(problems(tried)):
            config, peak = tried, lower
            turned[told(setting, value)] = peak
    return turned, read_knobs(config, gpus)


def turned_to(config: Config, setting: str, value: Any) -> Config:
    """The config with another value of one setting, by its dotted name."""
    section, _, name = setting.partition(".")
    changed: Any = {section: replace(getattr(config, section), **{name: value})}
    return replace(config, **changed)


def told(setting: str, value: Any) -> str:
    """As it is typed."""
    return f"{setting}={str(value).lower() if isinstance(value, bool) else value}"


def advice(
    job: Job,
    model: Anatomy,
    limit: float,
    *,
    gpus: int | None = None,
    resuming: bool = False,
    float8: bool = True,
) -> str:
    """What to change so that the job trains in `limit` bytes: settings and the peaks they leave,
    and where they are not enough, the length.

    gpus: of the run. resuming: a run goes on with the change, so what begins another run is told
    apart. float8: whether the GPU multiplies in it.
    """
    tokens = job.config.train.batch * len(job.grid(job.frames))
    found, knobs = remedies(job.config, model, tokens, limit, gpus, float8=float8)
    steps = {setting: f"{setting} ({peak / GIB:.1f} GiB)" for setting, peak in found.items()}
    more = None
    if not found or [*found.values()][-1] > limit:
        frames, native = longest_training(job, model, limit, knobs), job.native_frames
        if frames is None or frames < native:
            more = f"a GPU with more memory, for not even the native {native} frames fit"
        else:
            steps["frames"] = f"frames={frames}, the most that then fit"
    fixed = [setting for setting in steps if not _is_free(setting)]
    if resuming and fixed:
        steps[fixed[0]] = f"in another run.dir, {steps[fixed[0]]}"
    return "; then ".join([*steps.values(), *([more] if more else [])])


def _is_free(setting: str) -> bool:
    """Whether a run may take up `setting=value` where it stands."""
    return setting.partition("=")[0] in FREE_KEYS


def check_memory(job: Job, device: torch.device, gpus: int | None = None) -> str | None:
    """Before a run: one sentence if its steps are predicted not to fit the device, else None.

    Raises ConfigError if the frozen base and the adapter alone are larger than its memory.
    """
    limit = device_memory(device)
    if limit is None:
        return None
    model = anatomy(job)
    needed = predicted_memory(job, model, gpus)
    if needed.peak <= limit:
        return None
    has = f"and the GPU has {limit / GIB:.1f} GiB"
    helps = advice(job, model, limit, gpus=gpus, float8=is_supported(device))
    if needed.fixed > limit:
        raise ConfigError(
            f"The frozen base and the adapter alone take {needed.fixed / GIB:.1f} GiB, {has}. "
            f"What would help: {helps}."
        )
    return (
        f"A step is predicted to take {needed.peak / GIB:.1f} GiB, {has}: it may run out. "
        f"`longreel plan` shows the parts. What would help: {helps}."
    )


def how_to_go_on(job: Job, device: torch.device, newest: Path | None) -> str:
    """What a run that ran out of memory is told: what is saved, and what to change.

    newest: the run's newest checkpoint; None: there is none, so that every setting may change.
    """
    saved = "No step is saved yet: the same command begins the run again"
    if newest is not None:
        step = checkpoint.load_progress(newest).step
        saved = f"Step {step} is saved in {newest}: the same command goes on from there"
    return f"{saved}.\n{_relief(job, device, newest is not None)}."


def _relief(job: Job, device: torch.device, resuming: bool) -> str:
    """What to change in a job that ran out of memory, whatever had been predicted."""
    model, limit = anatomy(job), device_memory(device)
    change = "What to change, what costs least first"
    if limit is None:  # not planned: no peaks, and the settings that any run may take up
        tokens = job.config.train.batch * len(job.grid(job.frames))
        free = "; then ".join(filter(_is_free, remedies(job.config, model, tokens, 0)[0]))
        return f"{change}: {free or NO_SETTING}"
    predicted = predicted_memory(job, model).peak
    verdict = "" if predicted > limit else ": the prediction is too low"
    # Where it is, what is meant to fit must be below it by as much as below the GPU's memory.
    known = 0.9 * min(limit, predicted)
    helps = advice(job, model, known, resuming=resuming, float8=is_supported(device))
    return (
        f"A step was predicted to take {predicted / GIB:.1f} GiB, and the GPU has "
        f"{limit / GIB:.1f} GiB{verdict}.\n{change}, with the peak then predicted: {helps}"
    )


def predicted_memory(job: Job, model: Anatomy, gpus: int | None = None) -> MemoryUse:
    """Of a step as the job sets it, in a run on so many GPUs."""
    tokens = job.config.train.batch * len(job.grid(job.frames))
    return training_memory(model, tokens, read_knobs(job.config, gpus))


def device_memory(device: torch.device) -> float | None:
    """Bytes of a GPU; None for a CPU, whose memory is not planned."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory
