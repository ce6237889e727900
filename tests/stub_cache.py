"""Encoders that need no model: latents are samples of the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from videos import steady

from longreel.data.cache import Bucket, CacheSpec, Encoders
from longreel.data.encode import Prepared, prepare
from longreel.data.sources import SourceSpec, list_videos

BUCKET = Bucket(9, 32, 48)
SPEC = CacheSpec((BUCKET,), fps=16, video_encoder="tiny-vae", text_encoder="tiny-text")


def encoders() -> Encoders:
    def video(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels[:, ::8, ::8].copy()).permute(3, 0, 1, 2).bfloat16()

    return Encoders(video, lambda caption: {"embeds": torch.full((len(caption), 2), 0.5)})


def build(folder: Path, spec: CacheSpec, cache: Path, load=encoders, **options) -> Prepared:
    source = SourceSpec(path=str(folder), cache_dir=str(cache))
    return prepare(list_videos(source), spec, cache, load, **options)


def add(folder: Path, name: str, num_frames: int, caption: str, fps: int = 16, **options) -> Path:
    path = steady(folder / name, num_frames, fps, **options)
    path.with_suffix(".txt").write_text(caption)
    return path
