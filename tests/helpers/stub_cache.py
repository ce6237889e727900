"""Stub encoders that need no model, and small videos, to fill caches in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from videos import numbers, steady

from longreel.data.cache import Bucket, CacheSpec, Encoders
from longreel.data.listing import SourceSpec
from longreel.data.prepare import Prepared, prepare
from longreel.data.sources import list_videos

BUCKET = Bucket(9, 32, 48)
SPEC = CacheSpec((BUCKET,), fps=16, video_encoder="tiny-vae", text_encoder="tiny-text")


def encoders() -> Encoders:
    """Return encoders whose latents `[3, F, h / 8, w / 8]` are samples of the pixels."""

    def video(pixels: np.ndarray) -> torch.Tensor:
        assert pixels.dtype == np.uint8
        return torch.from_numpy(pixels[:, ::8, ::8].copy()).permute(3, 0, 1, 2).bfloat16()

    def text(caption: str) -> dict[str, torch.Tensor]:
        return {"embeds": torch.full((len(caption), 2), 0.5), "mask": torch.ones(len(caption))}

    return Encoders(video, text)


class Recording:
    """Loads the same encoders, and records how often it did and what they were given."""

    def __init__(self, clips_before_failure: int | None = None) -> None:
        self.loads, self.clips, self.captions = 0, [], []
        self.clips_before_failure = clips_before_failure
        self.encoders = encoders()

    def __call__(self) -> Encoders:
        self.loads += 1
        return Encoders(self.video, self.text)

    def video(self, pixels: np.ndarray) -> torch.Tensor:
        if len(self.clips) == self.clips_before_failure:
            raise KeyboardInterrupt
        self.clips.append(numbers(pixels))
        return self.encoders.video(pixels)

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        self.captions.append(caption)
        return self.encoders.text(caption)


def never() -> Encoders:
    raise AssertionError("nothing is to be encoded")


def build(folder: Path, spec: CacheSpec, cache: Path, load=encoders, **options) -> Prepared:
    source = SourceSpec(path=str(folder), cache_dir=str(cache))
    return prepare(list_videos(source), spec, cache, load, **options)


def add(
    folder: Path, name: str, num_frames: int, caption: str | None, fps: int = 16, **options
) -> Path:
    """Write a numbered video with a caption, or without one if it is None."""
    path = steady(folder / name, num_frames, fps, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path
