"""Advise what to change in a run that does not fit, or that ran out of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.checks import problems
from ..config.schema import Config
from ..config.values import ConfigError
from ..job import Job
from ..memory.float8 import is_supported
from ..run import checkpoint
from ..run.resume import FREE_KEYS
from .anatomy import Anatomy, anatomy
from .estimate import GIB, Knobs, read_knobs, training_memory
from .predict import longest_training, predicted_memory

# Settings, and their values, that lower the peak, those that cost the least time first.
REMEDIES: tuple[tuple[str, Any], ...] = (
    ("memory.recompute", "all_but_attention"),  # instead of none; offload needs it
    ("memory.offload", True),
    ("memory.offload_keep", 0),
    ("memory.recompute", "all"),
    ("memory.offload", True),  # if attention's result cannot be kept, so not before
    ("memory.mlp_chunk", 16384),
    ("lora.compute_dtype", "bfloat16"),
    ("train.optimizer", "adamw8bit"),
    ("parallel.engine", "fsdp2"),  # on several GPUs, without 8-bit moments
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
    """Return settings that bring a step of `tokens` below `limit` bytes, and the knobs with them.

    Each setting is applied on top of those before it, one of which may be another value of the
    same key; its value is the peak in bytes that it leaves. Settings that do not help, or conflict
    with those before them, are left out. The last one may still not be enough; a limit of 0 gives
    all. float8: whether the GPU supports float8 products.
    """
    found: dict[str, float] = {}
    peak = training_memory(model, tokens, read_knobs(config, gpus)).peak
    for setting, value in REMEDIES:
        if peak <= limit:
            break
        if value == "float8" and not float8:
            continue
        tried = with_setting(config, setting, value)
        lower = training_memory(model, tokens, read_knobs(tried, gpus)).peak
        if lower < peak and not any(problems(tried)):
            config, peak = tried, lower
            found[as_argument(setting, value)] = peak
    return found, read_knobs(config, gpus)


def with_setting(config: Config, setting: str, value: Any) -> Config:
    """Return the config with another value of one setting, which is named by its dotted key."""
    section, _, name = setting.partition(".")
    changed: Any = {section: replace(getattr(config, section), **{name: value})}
    return replace(config, **changed)


def as_argument(setting: str, value: Any) -> str:
    """Return `key=value` as typed on the command line."""
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
    """Say what to change so that the job trains in `limit` bytes.

    Names settings and the peaks they leave and, if they are not enough, the length that fits.
    gpus: of the run. resuming: the run continues with the change, so settings that need another run
    folder are marked. float8: whether the GPU supports float8 products.
    """
    tokens = job.config.train.batch * len(job.grid(job.frames))
    found, knobs = remedies(job.config, model, tokens, limit, gpus, float8=float8)
    steps = {setting: f"{setting} ({peak / GIB:.1f} GiB)" for setting, peak in found.items()}
    more = None
    if not found or [*found.values()][-1] > limit:
        frames, native = longest_training(job, model, limit, knobs), job.native_frames
        if frames is None or frames < native:
            more = f"a GPU with more memory: not even the native {native} frames fit"
        else:
            steps["frames"] = f"frames={frames}, the most that then fits"
    fixed = [setting for setting in steps if not _may_change(setting)]
    if resuming and fixed:
        steps[fixed[0]] = f"in another run.dir, {steps[fixed[0]]}"
    return "; then ".join([*steps.values(), *([more] if more else [])])


def _may_change(setting: str) -> bool:
    """Return whether a run may resume with another `setting=value`."""
    return setting.partition("=")[0] in FREE_KEYS


def check_memory(job: Job, device: torch.device, gpus: int | None = None) -> str | None:
    """Return a warning if a step of the job is predicted not to fit the device, else None.

    Raises ConfigError if the frozen base and the adapter alone exceed the device's memory.
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
            f"Remedies: {helps}."
        )
    return (
        f"A step is predicted to take {needed.peak / GIB:.1f} GiB, {has}: it may run out. "
        f"`longreel plan` shows the parts. Remedies: {helps}."
    )


def how_to_go_on(job: Job, device: torch.device, newest: Path | None) -> str:
    """Tell a run that ran out of memory what is saved, and what to change.

    newest: the run's newest checkpoint; None if there is none, so that every setting may change.
    """
    saved = "No step is saved yet: the same command starts the run again"
    if newest is not None:
        step = checkpoint.load_progress(newest).step
        saved = f"Step {step} is saved in {newest}: the same command continues from there"
    return f"{saved}.\n{_relief(job, device, newest is not None)}."


def _relief(job: Job, device: torch.device, resuming: bool) -> str:
    """Say what to change in a job that ran out of memory, whatever had been predicted."""
    model, limit = anatomy(job), device_memory(device)
    change = "Remedies, the cheapest first"
    if limit is None:  # memory is not planned: no peaks, and only settings that any run may change
        tokens = job.config.train.batch * len(job.grid(job.frames))
        free = "; then ".join(filter(_may_change, remedies(job.config, model, tokens, 0)[0]))
        return f"{change}: {free or NO_SETTING}"
    predicted = predicted_memory(job, model).peak
    verdict = "" if predicted > limit else ": the prediction is too low"
    # If it is too low, remedies must bring the peak as far below the prediction as, otherwise,
    # below the GPU's memory.
    target = 0.9 * min(limit, predicted)
    helps = advice(job, model, target, resuming=resuming, float8=is_supported(device))
    return (
        f"A step was predicted to take {predicted / GIB:.1f} GiB, and the GPU has "
        f"{limit / GIB:.1f} GiB{verdict}.\n{change}, with the predicted peaks: {helps}"
    )


def device_memory(device: torch.device) -> float | None:
    """Return the bytes of a GPU's memory; None for a CPU, whose memory is not planned."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory
