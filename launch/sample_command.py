"""`longreel sample`: a video from a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trainer.config.fields import POSITIVE, SEED, setting
from ..trainer.config.values import ConfigError, parse

USAGE = """\
longreel sample lora=RUN prompt="..." [key=value ...]
accelerate launch --no_python longreel sample ...           by several GPUs: docs/parallel.md"""


@dataclass(frozen=True)
class SampleOptions:
    """The options of `longreel sample`."""

    lora: str = setting("", "A run, one of its checkpoints, or an adapter file.")
    prompt: str = setting("", "What the video shows.")
    out: str = setting("sample.mp4", "The mp4 file to write.")
    negative: str = setting("", "What classifier-free guidance leads away from.")
    frames: int | None = setting(
        None, "Frames of the video; null takes the length that was trained.", POSITIVE
    )
    height: int | None = setting(
        None, "Height in pixels; null takes the one that was trained.", POSITIVE
    )
    width: int | None = setting(
        None, "Width in pixels; null takes the one that was trained.", POSITIVE
    )
    steps: int | None = setting(None, "Diffusion steps; null takes the family's.", POSITIVE)
    guidance: float | None = setting(None, "Guidance; null takes the family's.")
    seed: int = setting(0, "Seed of the initial noise.", SEED)
    fps: int | None = setting(
        None, "Frames a second of the mp4; null takes those that were trained.", POSITIVE
    )
    model: str | None = setting(
        None, "Folder or repository of the base model, if it has moved since training."
    )
    cache: str = setting("cache", "Folder of tiny models.")
    device: str | None = setting(None, "Such as cuda:1 or cpu; null takes a GPU if there is one.")
    dense: bool = setting(
        False, "Sample without the sparse attention that the adapter was trained with."
    )


OPTIONS = SampleOptions


def sample(argv: list[str]) -> None:
    """Generate one video and write it as an mp4.

    Several processes do it together, and the first of them decodes and writes.
    """
    options = parse(SampleOptions, argv)
    check(options)

    from ..trainer.adapter.lora import check_fits, read_entry
    from ..trainer.config.recipe import pattern_from_dict
    from ..trainer.families import RopePolicy, family_of
    from ..trainer.sampling.pipeline import base_model

    entry = read_entry(options.lora)
    size = {
        key: entry[key] if getattr(options, key) is None else getattr(options, key)
        for key in ("frames", "height", "width")
    }
    family = family_of(entry)
    steps = family.defaults.steps if options.steps is None else options.steps
    base = base_model(entry, options.model, options.cache)
    geometry = family.read_geometry(*base)
    geometry.latent_shape(**size, rope=RopePolicy.recorded(entry))
    family.defaults.check_steps("steps", steps)
    check_fits(family.loader.blank_transformer(*base), options.lora)
    pattern_from_dict(entry["pattern"])

    import torch

    from ..data.write_video import write_video
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


def check(options: SampleOptions) -> None:
    """Raise ConfigError for what would fail only after the model has loaded or sampled."""
    for key in ("lora", "prompt"):
        if not getattr(options, key):
            raise ConfigError(f"{key}=... is missing. `longreel sample --help` lists the keys.")
    if not options.out.endswith(".mp4"):
        raise ConfigError(f"out={options.out} must end in .mp4.")
    if options.device is not None:
        import torch

        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device={options.device} cannot be used: {reason}") from error
