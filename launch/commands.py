"""The `longreel` command: what is done with a run besides training it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..trainer.config import Cache, ConfigError, load, parse
from ..trainer.families import family_of
from ..trainer.job import Job
from ..trainer.lora import read_entry
from ..trainer.sampling import base_model

USAGE = """\
longreel sample lora=RUN prompt="..." [key=value ...]   generate a video with a trained adapter
longreel train recipe=NAME [key=value ...]              train on one process; on more:
                                                        accelerate launch train.py ...

Keys of `sample`: lora, prompt, out, negative, frames, height, width, steps, guidance, seed, fps,
model (folder or repository, if the base model has moved), cache (folder of tiny models), device,
dense (true: without the sparse attention the adapter was trained with)."""


@dataclass(frozen=True)
class Sample:
    """`longreel sample`. lora: a run, one of its checkpoints, or an adapter file; the rest of the
    unset keys take what the adapter records."""

    lora: str = ""
    prompt: str = ""
    out: str = "sample.mp4"
    negative: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    fps: int | None = None
    model: str | None = None
    cache: str = Cache.dir
    device: str | None = None
    dense: bool = False


def sample(argv: list[str]) -> None:
    """Generate one video and write it as an mp4."""
    options = parse(Sample, argv)
    _check(options)
    entry = read_entry(options.lora)
    size = {
        key: entry[key] if getattr(options, key) is None else getattr(options, key)
        for key in ("frames", "height", "width")
    }
    geometry = family_of(entry).geometry(*base_model(entry, options.model, options.cache))
    family_of(entry).latent_shape(**size, geometry=geometry)  # refused before weights load

    from ..data.decode import write_video
    from ..trainer.progress import quiet_libraries
    from ..trainer.sampling import generate, load_pipeline

    quiet_libraries()
    pipe = load_pipeline(
        options.lora,
        model_path=options.model,
        device=options.device,
        sparse=not options.dense,
        cache_dir=options.cache,
    )
    frames = generate(
        pipe,
        prompt=options.prompt,
        negative=options.negative,
        **size,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        progress=True,
    )
    write_video(Path(options.out), frames, options.fps or entry["fps"])
    print(options.out)


def _check(options: Sample) -> None:
    """Raise ConfigError for what would fail only after the model has loaded or sampled."""
    for key in ("lora", "prompt"):
        if not getattr(options, key):
            raise ConfigError(f"{key}=... is missing.\n\n{USAGE}")
    if not options.out.endswith(".mp4"):
        raise ConfigError(f"out={options.out} must end in .mp4.")
    for key in ("frames", "height", "width", "steps", "fps"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be positive.")
    if options.device is not None:
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device={options.device} cannot be used: {reason}") from error


def train(argv: list[str]) -> None:
    """Train as the recipe says; mistakes in it are told before anything heavy is imported."""
    job = Job.from_config(load(argv))
    from ..trainer.loop import Trainer

    Trainer(job).fit()


COMMANDS: dict[str, Callable[[list[str]], None]] = {"sample": sample, "train": train}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise ConfigError(f"{name!r} is no command.\n\n{USAGE}")
        COMMANDS[name](rest)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
