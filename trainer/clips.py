"""Fill the cache with a job's latents and text embeddings, by its family's own encoders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.cache import CacheSpec, Encoders
from ..data.captions import CaptionLimit
from ..data.encode import Prepared, prepare
from ..data.listing import SourceSpec
from ..data.report import Report
from ..data.sources import list_videos
from ..data.survey import Team
from ..data.synthetic import Arena, Source, write_folder
from .config.schema import Config
from .config.source import SYNTHETIC, is_drawn
from .config.values import ConfigError
from .families.text import Text
from .job import Job
from .run.progress import StageLog

log = logging.getLogger(__name__)


def prepare_data(job: Job, accelerator: Accelerator, dtype: torch.dtype) -> Prepared:
    """The clips to train on and the prompts to sample, encoded where the cache lacks them.

    All processes must call it, and each encodes a share on its device. Encoders are loaded only if
    something is missing, after the report on the data has been logged. Raises ConfigError when the
    videos or their captions leave nothing to train on, and when the cache's disk is full.
    """
    config, device = job.config, accelerator.device
    wait = accelerator.wait_for_everyone

    def agree(yes: bool) -> bool:
        answers: Any = accelerator.gather(torch.tensor([int(yes)], device=device))
        return bool(answers.all())

    team = Team(accelerator.process_index, accelerator.num_processes, wait, agree)
    encoders = _FamilyEncoders(job, device, dtype)
    try:
        # Clips are drawn, and a data set is fetched from the Hub, by one process for all.
        with accelerator.main_process_first():
            listing = list_videos(source_spec(job))
        return prepare(
            listing,
            cache_spec(job, dtype),
            config.cache.dir,
            lambda: Encoders(encoders.video, encoders.text),
            extra_captions=extra_captions(config),
            strict=config.data.strict,
            progress=StageLog(),
            announce=_announce,
            caption_limit=caption_limit(job),
            team=team,
            device=_device_name(device),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        encoders.free()


def source_spec(job: Job) -> SourceSpec:
    """Where the videos come from, and which of them; synthetic ones are drawn."""
    config, data = job.config, job.config.data
    if is_drawn(config):
        return SourceSpec(path=str(clips_folder(job)))
    assert data.path is not None
    return SourceSpec(
        source=data.source,
        path=data.path,
        subset=data.subset,
        split=data.split,
        revision=data.revision,
        video=data.video,
        caption=data.caption,
        filter=data.filter,
        top_k=data.top_k,
        top_by=data.top_by,
        cache_dir=config.cache.dir,
    )


def check_clips(job: Job) -> None:
    """Raise ConfigError if there are none to train on, or none of the job's size can be drawn."""
    if job.config.data.path is None and not is_drawn(job.config):
        raise ConfigError(
            "data.path is not set: the folder of videos with captions; or set data.source="
            "synthetic:NAME."
        )
    if is_drawn(job.config):
        _source(job)


def clips_folder(job: Job) -> Path:
    """The folder of a job's synthetic clips, which are drawn there if need be."""
    config = job.config
    parent = Path(config.cache.dir) / "synthetic"
    return write_folder(_source(job), config.data.synthetic.clips, job.fps, parent)


def _source(job: Job) -> Source:
    config = job.config
    try:
        arena = Arena(job.frames, config.height, config.width, job.native_frames)
        name = config.data.source.removeprefix(SYNTHETIC)
        return Source(name, arena, config.data.synthetic.seed)
    except ValueError as error:
        raise ConfigError(f"data.source={config.data.source}: {error}") from error


def cache_spec(job: Job, dtype: torch.dtype) -> CacheSpec:
    """What the clips are, and by which encoders in which precision."""
    config, data = job.config, job.config.data
    identity = f"{job.family.name}:{config.model.path}@{config.model.revision}"
    identity += f":{Path(job.model_path).name}:{dtype}"
    return CacheSpec(
        buckets=job.buckets(),
        fps=job.fps,
        video_encoder=identity,
        text_encoder=identity,
        windows=data.windows,
        stride=data.stride,
        least_scale=data.least_scale,
        shots=data.shots,
        canonical=data.canonical,
    )


def caption_limit(job: Job) -> CaptionLimit:
    """How captions are measured, with a tokenizer that is loaded if one may be too long."""
    loaded: list[Any] = []
    limit = job.family.text.caption_tokens

    def measure(caption: str) -> tuple[int, str]:
        if not loaded:
            path, revision = job.model_path, job.config.model.revision
            loaded.append(job.family.loader.caption_tokenizer(path, revision))
        ids = loaded[0](caption, add_special_tokens=False)["input_ids"]
        return len(ids), loaded[0].decode(ids[limit:])

    return CaptionLimit(limit, measure)


def _announce(report: Report) -> None:
    log.info("Before encoding: " + "\n".join(report.lines()))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
        return self.job.family.text.encode(self._pipeline("text"), caption)

    def video(self, pixels: np.ndarray) -> Tensor:
        latents = self.job.family.vae.encode(self._pipeline("vae").vae, torch.from_numpy(pixels))
        return latents.to(self.dtype)

    def free(self) -> None:
        """Give all memory back, also what PyTorch would keep for tensors of the same sizes."""
        self._pipe, self._holds = None, ""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pipeline(self, part: str) -> Any:
        if self._holds != part:
            self.free()  # before the other is read
            self._pipe = self.job.family.loader.load_pipeline(
                self.job.model_path,
                self.job.config.model.revision,
                text=part == "text",
                vae=part == "vae",
                dtype=self.dtype,
            ).to(self.device)
            self._holds = part
        return self._pipe
