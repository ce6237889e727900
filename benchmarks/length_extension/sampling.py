"""Clips from a cell's model, by the scheduler of the Wan pipeline, and what is measured on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from longreel.data.files import replacing
from longreel.data.synthetic import CAPTIONS, SETS, ClipSet
from longreel.trainer.families.names import diffusers_class
from longreel.trainer.sampling.pipeline import evaluating

from .pixels import PixelWan, to_pixels
from .training import half_products

SAMPLED = 3  # seed of the captions that are sampled
SHOWN_CLIPS, SHOWN_FRAMES = 2, 12  # of a strip


def captions_of(source: ClipSet, count: int, *, other: bool) -> list[str]:
    """Return the captions of a set's first clips; other: use the set's other caption for each."""
    captions = [source.caption(index) for index in range(count)]
    if not other:
        return captions
    both = [CAPTIONS[source.set_of(index)] for index in range(count)]
    return [b[1 - b.index(c)] for c, b in zip(captions, both, strict=True)]


@torch.no_grad()
def sample(
    model: Any,
    family: PixelWan,
    factor: int,
    name: str,
    *,
    seed: int,
    other_captions: bool,
    device: torch.device,
) -> np.ndarray:
    """Sample a set's clips as uint8 `[N, T, H, W, 3]`.

    Noise depends only on seed, set and number, so that cells of one length and seed share it.
    """
    scale = family.scale
    source = ClipSet(name, scale.arena(factor), SAMPLED)
    captions = captions_of(source, scale.samples, other=other_captions)
    grid = scale.grid(factor)
    shape = (scale.channels, grid.frames, grid.height, grid.width)
    clips = []
    with evaluating(model), half_products(device, model.dtype == torch.float32):
        for start in range(0, scale.samples, scale.sample_batch):
            numbers = range(start, min(start + scale.sample_batch, scale.samples))
            noise = torch.stack([_noise(shape, seed, name, number) for number in numbers])
            texts = [family.encode_caption(captions[number]) for number in numbers]
            text = {k: x.to(device) for k, x in family.text.collate(texts).items()}
            latents = _denoise(model, family, noise.to(device), text)
            clips.append(to_pixels(latents, scale.squeeze).cpu().numpy())
    return np.concatenate(clips)


def _denoise(model: Any, family: PixelWan, latents: torch.Tensor, text: dict) -> torch.Tensor:
    scale = family.scale
    scheduler = diffusers_class("UniPCMultistepScheduler")(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=scale.shift,
    )
    scheduler.set_timesteps(scale.sample_steps, device=latents.device)
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).float().expand(len(latents))
        prediction = family.noising.predict(model, latents, sigma, text)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def _noise(shape: tuple[int, ...], seed: int, name: str, number: int) -> torch.Tensor:
    index = (seed * len(SETS) + list(SETS).index(name)) * 1_000_003 + number
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))


def save_strip(path: Path, clips: np.ndarray) -> None:
    """Save some frames of each of the first clips as one picture."""
    from matplotlib.image import imsave

    frames = np.linspace(0, clips.shape[1] - 1, SHOWN_FRAMES).round().astype(int)
    rows = [np.pad(clip[frames], ((0, 0), (1, 1), (1, 1), (0, 0))) for clip in clips[:SHOWN_CLIPS]]
    picture = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    with replacing(path) as temporary:
        imsave(temporary, picture, format="png")
