"""Fill the cache with a job's latents and text embeddings, by its family's own encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.encode import CacheSpec, Encoders, Prepared, prepare
from .config import Config, ConfigError
from .families.base import Text
from .job import Job
from .progress import StageLog
from .source import clips_folder


def prepare_data(job: Job, device: torch.device, dtype: torch.dtype) -> Prepared:
    """The clips to train on and the prompts to sample, encoded where the cache lacks them.

    Encoders are loaded only if something is missing. Raises ConfigError when the videos or their
    captions leave nothing to train on.
    """
    config = job.config
    identity = f"{job.family.name}:{config.model.path}@{config.model.revision}"
    identity += f":{Path(job.model_path).name}:{dtype}"
    spec = CacheSpec(
        frames=job.frames,
        height=config.height,
        width=config.width,
        fps=job.fps,
        windows=config.data.windows,
        stride=config.data.stride,
        video_encoder=identity,
        text_encoder=identity,
    )
    encoders = _FamilyEncoders(job, device, dtype)
    try:
        return prepare(
            clips_folder(job),
            spec,
            config.cache.dir,
            lambda: Encoders(encoders.video, encoders.text),
            extra_captions=extra_captions(config),
            strict=config.data.strict,
            progress=StageLog(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        encoders.free()


def extra_captions(config: Config) -> list[str]:
    """What is encoded beside the clips' captions: prompts, and the empty one, which guidance leads
    away from and which stands in for dropped captions."""
    prompts = config.validate.prompts
    return [*prompts, ""] if prompts or config.train.caption_dropout else []


class _FamilyEncoders:
    """Text encoder and VAE, never both in memory: captions all come before the first clip."""

    def __init__(self, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        self.job, self.device, self.dtype = job, device, dtype
        self._pipe: Any = None
        self._holds = ""

    def text(self, caption: str) -> Text:
        return self.job.family.encode_text(self._pipeline("text"), caption)

    def video(self, pixels: np.ndarray) -> Tensor:
        latents = self.job.family.encode_video(self._pipeline("vae"), torch.from_numpy(pixels))
        return latents.to(self.dtype)

    def free(self) -> None:
        """Give all memory back, also what PyTorch would keep for tensors of the same sizes."""
        self._pipe, self._holds = None, ""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pipeline(self, part: str) -> Any:
        if self._holds != part:
            self.free()  # before the other is read
            self._pipe = self.job.family.load_pipeline(
                self.job.model_path,
                self.job.config.model.revision,
                text=part == "text",
                vae=part == "vae",
                dtype=self.dtype,
            ).to(self.device)
            self._holds = part
        return self._pipe
