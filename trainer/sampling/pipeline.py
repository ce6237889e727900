"""Videos from a trained adapter: `pipe = load_pipeline("runs/x")`, then any stock pipeline call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.block_sparse.op import Backend
from ...sparse.attention import SparseAttention, Step
from ...sparse.patterns import Dense
from ..adapter import lora
from ..config.recipe import pattern_from_dict
from ..config.schema import Cache
from ..config.values import ConfigError
from ..families import (
    FAMILIES,
    ModelFamily,
    RopePolicy,
    family_of,
    installed_attention,
    installed_rope,
)
from ..families.text import Text
from ..parallel.sequence import SequenceGroup


def load_pipeline(
    run: str | Path,
    *,
    model_path: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sparse: bool = True,
    text: bool = True,
    backend: Backend = "auto",
    cache_dir: str | Path = Cache.dir,
) -> Any:
    """Load the stock diffusers pipeline with the adapter, its attention and its RoPE.

        pipe = load_pipeline("runs/x")
        frames = pipe(prompt="...", num_frames=161).frames[0]

    run: an adapter's folder or file. model_path: replaces the recorded base model. dtype: None for
    bf16 on a GPU and fp32 on a CPU. sparse: False for the model's own dense attention; the RoPE is
    the adapter's in both cases.
    text: False to omit the text encoders, for prompts encoded by `encode_captions`.
    backend: of the block-sparse kernel. cache_dir: where a `tiny` base model is kept.
    """
    entry, file = lora.read_entry(run), lora.adapter_file(run)
    family = family_of(entry)
    path, revision = base_model(entry, model_path, cache_dir)
    family.read_geometry(path, revision)  # refuses missing or unsupported models before any weights
    lora.check_fits(family.loader.blank_transformer(path, revision), file)
    device, dtype = _device_and_dtype(device, dtype)
    transformer = family.loader.load_transformer(path, revision, dtype)
    pipe = family.loader.load_pipeline(
        path, revision, transformer=transformer, text=text, dtype=dtype
    )
    pipe.to(device)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="longreel")
    if sparse:
        apply_sparse_attention(pipe, entry, backend=backend)
    else:
        apply_rope(pipe, entry)
    return pipe


def encode_captions(
    run: str | Path,
    captions: Sequence[str],
    *,
    model_path: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path = Cache.dir,
) -> list[Text]:
    """Encode prompts for `generate`, by the base model's text encoders alone.

    The encoders are freed again: HunyuanVideo's take 16 GB, which the transformer and its
    activations can use. Parameters are those of `load_pipeline`.
    """
    entry = lora.read_entry(run)
    family = family_of(entry)
    path, revision = base_model(entry, model_path, cache_dir)
    device, dtype = _device_and_dtype(device, dtype)
    pipe = family.loader.load_pipeline(path, revision, vae=False, dtype=dtype).to(device)
    texts = [family.text.encode(pipe, caption) for caption in captions]
    del pipe
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return texts


def _device_and_dtype(
    device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def base_model(
    entry: dict[str, Any], model_path: str | None, cache_dir: str | Path
) -> tuple[str, str | None]:
    """Return folder or repository, and revision, of the base; `model_path` overrides both."""
    path, revision = entry["model"]["path"], entry["model"]["revision"]
    if model_path is not None:
        path, revision = model_path, None
    return family_of(entry).loader.resolve(path, cache_dir), revision


def apply_sparse_attention(
    pipe: Any, entry: dict[str, Any], *, backend: Backend = "auto"
) -> SparseAttention:
    """Let a stock pipeline attend as the adapter of `entry` (`lora.read_entry`) was trained, its
    RoPE included.

    Returns the attention, whose fields may be changed between calls of the pipeline.
    """
    family = _family_for(pipe, entry)
    apply_rope(pipe, entry)
    attention = SparseAttention(
        pattern_from_dict(entry["pattern"]),
        block=entry["block"],
        backend=backend,
        dense_layers=entry["dense_layers"],
        dense_steps=entry["dense_steps"],
    )
    attention.schedule = _step_of(pipe)
    family.install(pipe.transformer, attention)
    return attention


def share_tokens(pipe: Any, group: SequenceGroup) -> None:
    """Let the processes of a group compute each video together; without an adapter's attention,
    dense.

    Each process then calls the pipeline with the same arguments and noise, and each has all of the
    latents that come of it. After everything else that changes the pipeline.
    """
    family = next(f for f in FAMILIES.values() if f.names.pipeline == type(pipe).__name__)
    attention = installed_attention(pipe.transformer)
    if attention is None:  # the stock processors know nothing of other processes
        attention = SparseAttention(Dense())
        family.install(pipe.transformer, attention)
    group.attach(family, pipe.transformer, attention)


def apply_rope(pipe: Any, entry: dict[str, Any]) -> None:
    """Let a stock pipeline's RoPE follow the policy of the adapter of `entry` (`lora.read_entry`).

    Its attention stays as it is: for an adapter that is to be sampled dense.
    """
    _family_for(pipe, entry).rope.apply(pipe.transformer, RopePolicy.recorded(entry))


def _family_for(pipe: Any, entry: dict[str, Any]) -> ModelFamily:
    """Return the family of the adapter; raise ConfigError if the pipeline is of another."""
    family = family_of(entry)
    if type(pipe).__name__ != family.names.pipeline:
        raise ConfigError(
            f"The adapter is for {family.names.pipeline}, the pipeline is a {type(pipe).__name__}."
        )
    return family


def _step_of(pipe: Any) -> Callable[[Tensor], Step]:
    """Return a function that tells the index of a forward's diffusion step, and their number.

    The scheduler counts steps, and guidance may call the model several times in one. The timestep
    is used only if the scheduler does not count: with a bf16 HunyuanVideo neighbouring timesteps
    are rounded to the same value.
    """

    def step(timestep: Tensor) -> Step:
        timesteps = pipe.scheduler.timesteps
        if hasattr(pipe.scheduler, "step_index"):
            index = pipe.scheduler.step_index or 0  # None until the first step has ended
        else:
            index = (timesteps - timestep.flatten()[0].to(timesteps.device)).abs().argmin()
        return int(index), len(timesteps)

    return step


def generate(
    pipe: Any,
    *,
    prompt: str | Text,
    negative: str | Text = "",
    frames: int,
    height: int,
    width: int,
    steps: int,
    guidance: float | None = None,
    seed: int,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the frames of one video, uint8 `[height, width, 3]`, decoded on demand.

    pipe: of one of the FAMILIES, with a VAE. prompt, negative: text, or what the family's
    `encode_text` gave when the pipeline has no text encoder.
    guidance: None for the family's; at most 1 for none, which leaves `negative` unread, as does a
    model that is told its guidance. seed: of the initial noise, drawn on the CPU, so it does not
    depend on the device.

    The transformer may be one in training: its modes, its attention's plan and schedule, gradients
    and torch's global random state are left as they were.
    """
    family = next(f for f in FAMILIES.values() if f.names.pipeline == type(pipe).__name__)
    geometry = family.geometry_of(pipe)
    family.defaults.check_steps("steps", steps)
    guidance = family.defaults.guidance if guidance is None else guidance
    rope = installed_rope(pipe.transformer)
    shape = geometry.latent_shape(frames, height, width, rope)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    text = _encoded(pipe, family, prompt)
    uses_negative = geometry.uses_negative(guidance)
    against = _encoded(pipe, family, negative) if uses_negative else None
    device = pipe._execution_device
    inputs = family.text.pipeline_inputs(text, against, guidance)
    with _sampling(pipe, progress):
        latents = pipe(
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            latents=noise,
            output_type="latent",
            **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()},
        ).frames[0]
    return family.vae.decode(pipe.vae, latents)


def _encoded(pipe: Any, family: ModelFamily, text: str | Text) -> Text:
    if not isinstance(text, str):
        return text
    if any(getattr(pipe, name) is None for name in family.loader.text_components):
        raise ValueError(
            f"The pipeline has no text encoder for {text!r}: give what `encode_text` made of it."
        )
    return family.text.encode(pipe, text)


@contextmanager
def _sampling(pipe: Any, progress: bool) -> Iterator[None]:
    """Set evaluation mode, dense steps and a quiet pipeline; restore everything on exit."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    logger = logging.getLogger(type(pipe).__module__)
    level = logger.level
    with evaluating(pipe.transformer), _scheduled(installed_attention(pipe.transformer), pipe):
        try:
            pipe.set_progress_bar_config(**bar | {"disable": not progress})
            # It warns of a rounded `num_frames`; sizes are checked, and `latents` decide.
            logger.setLevel(logging.ERROR)
            yield
        finally:
            pipe.set_progress_bar_config(**bar)
            logger.setLevel(level)


@contextmanager
def _scheduled(attention: SparseAttention | None, pipe: Any) -> Iterator[None]:
    """Give an installed attention the diffusion step; restore its plan and schedule on exit."""
    if attention is None:
        yield
        return
    schedule, attention.schedule = attention.schedule, _step_of(pipe)
    try:
        with attention.using(attention.current):
            yield
    finally:
        attention.schedule = schedule


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode; restore the mode of every submodule on exit."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
