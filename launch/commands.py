"""The `longreel` command: training a run, and what is done before and after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..trainer.adapter.lora import check_fits, read_entry
from ..trainer.config.fields import SEED_LIMIT
from ..trainer.config.recipe import load, parse, pattern_from_dict
from ..trainer.config.schema import Cache
from ..trainer.config.values import ConfigError
from ..trainer.families import RopePolicy, family_of
from ..trainer.job import Job
from ..trainer.sampling.comfyui import export_comfyui
from ..trainer.sampling.pipeline import base_model
from .analyze_command import ANALYZE_USAGE, analyze
from .cache_command import CACHE_USAGE, cache
from .draw_command import DRAW_USAGE, draw
from .plan_command import PLAN_USAGE, plan

USAGE = f"""\
longreel sample lora=RUN prompt="..." [key=value ...]   generate a video with a trained adapter;
                                                        by several GPUs: see docs/parallel.md
longreel export lora=RUN [key=value ...]                write the adapter for ComfyUI
longreel train recipe=NAME [key=value ...]              train on one process; on more:
                                                        accelerate launch train.py ...
{PLAN_USAGE}
{DRAW_USAGE}
{CACHE_USAGE}
{ANALYZE_USAGE}

Keys of `sample`: lora, prompt, out, negative, frames, height, width, steps, guidance, seed, fps,
model (folder or repository, if the base model has moved), cache (folder of tiny models), device,
dense (true: without the sparse attention the adapter was trained with).

Keys of `export`: lora, out (unset: RUN_comfyui.safetensors in the run's folder), dtype (float32 or
bfloat16), model, cache.

Keys of `plan` beside a recipe's: gpu (h200, h100, a100, a100_40), gpus, memory (GiB of one, if
another), price (of one for an hour), clips (in the cache).

Keys of `cache`: dir (the cache), delete (verify: damaged files; gc: unused ones), days (gc: a run
started within so many keeps its files), out, model, device (show).

Keys of `analyze` beside a recipe's: masks, sigmas, layers, clips, rows, positions, out; see
docs/analyze.md."""


@dataclass(frozen=True)
class Sample:
    """`longreel sample`. lora: a run, one of its checkpoints, or an adapter file. Sizes and fps
    that are not set are those the adapter records; steps and guidance are the family's."""

    lora: str = ""
    prompt: str = ""
    out: str = "sample.mp4"
    negative: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    fps: int | None = None
    model: str | None = None
    cache: str = Cache.dir
    device: str | None = None
    dense: bool = False


def sample(argv: list[str]) -> None:
    """Generate one video and write it as an mp4; several processes do it together, and the first
    of them decodes and writes."""
    options = parse(Sample, argv)
    _check(options)
    entry = read_entry(options.lora)
    size = {
        key: entry[key] if getattr(options, key) is None else getattr(options, key)
        for key in ("frames", "height", "width")
    }
    family = family_of(entry)
    steps = family.steps if options.steps is None else options.steps
    base = base_model(entry, options.model, options.cache)
    geometry = family.geometry(*base)
    family.latent_shape(**size, geometry=geometry, rope=RopePolicy.recorded(entry))
    family.check_steps("steps", steps)
    check_fits(family.blank_transformer(*base), options.lora)
    pattern_from_dict(entry["pattern"])

    from ..data.decode import write_video
    from ..trainer.parallel.sequence import join_all
    from ..trainer.run.progress import quiet_libraries
    from ..trainer.sampling.pipeline import encode_captions, generate, load_pipeline, share_tokens

    group, device = join_all(geometry.heads, options.device)
    quiet_libraries()
    model: Any = {"model_path": options.model, "device": device, "cache_dir": options.cache}
    # Text encoders and transformer are never in memory together.
    prompt, negative = encode_captions(options.lora, [options.prompt, options.negative], **model)
    pipe = load_pipeline(options.lora, sparse=not options.dense, text=False, **model)
    if group.size > 1:
        share_tokens(pipe, group)
    frames = generate(
        pipe,
        prompt=prompt,
        negative=negative,
        **size,
        steps=steps,
        guidance=options.guidance,
        seed=options.seed,
        progress=group.rank == 0,
    )
    if group.size > 1:
        torch.distributed.destroy_process_group()  # nothing is exchanged from here on
    if group.rank == 0:
        write_video(Path(options.out), frames, options.fps or entry["fps"])  # decodes as it writes
        print(options.out)


def _check(options: Sample) -> None:
    """Raise ConfigError for what would fail only after the model has loaded or sampled."""
    _check_given(options, "lora", "prompt")
    if not options.out.endswith(".mp4"):
        raise ConfigError(f"out={options.out} must end in .mp4.")
    for key in ("frames", "height", "width", "steps", "fps"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be positive.")
    if not 0 <= options.seed < SEED_LIMIT:
        raise ConfigError(f"seed={options.seed} must be from 0 to below 2^32.")
    if options.device is not None:
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device={options.device} cannot be used: {reason}") from error


def _check_given(options: Sample | Export, *keys: str) -> None:
    for key in keys:
        if not getattr(options, key):
            raise ConfigError(f"{key}=... is missing. `longreel --help` lists the keys.")


@dataclass(frozen=True)
class Export:
    """`longreel export`. lora, model, cache: as for `sample`. out, dtype: as `export_comfyui`'s."""

    lora: str = ""
    out: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    model: str | None = None
    cache: str = Cache.dir


def export(argv: list[str]) -> None:
    """Write an adapter in the format that ComfyUI loads, and print the file's name."""
    options = parse(Export, argv)
    _check_given(options, "lora")
    file = export_comfyui(
        options.lora,
        options.out,
        model_path=options.model,
        dtype=getattr(torch, options.dtype),
        cache_dir=options.cache,
    )
    print(file)


def train(argv: list[str]) -> None:
    """Train as the recipe says; mistakes in it are reported before anything heavy is imported."""
    job = Job.from_config(load(argv))
    from ..trainer import loop

    loop.train(job)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "sample": sample,
    "export": export,
    "train": train,
    "plan": plan,
    "draw": draw,
    "cache": cache,
    "analyze": analyze,
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise ConfigError(f"{name!r} is no command.\n\n{USAGE}")
        COMMANDS[name](rest)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
