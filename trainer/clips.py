"""Fill the cache with a job's latents and text embeddings, using the encoders of its family."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.cache import CacheSpec, Encoders
from ..data.captions import CaptionLimit
from ..data.identity import EncoderIdentity
from ..data.listing import SourceSpec
from ..data.prepare import Prepared, prepare
from ..data.process_group import ProcessGroup
from ..data.report import Report
from ..data.sources import list_videos
from ..data.synthetic import Arena, ClipSet, write_folder
from .config.schema import Config
from .config.source import SYNTHETIC, is_drawn
from .config.values import ConfigError
from .families.text import Text
from .job import Job
from .run.progress import StageLog

log = logging.getLogger(__name__)


def prepare_data(job: Job, accelerator: Accelerator, dtype: torch.dtype) -> Prepared:
    """Encode the clips to train on and the prompts to sample, as far as the cache lacks them.

    All processes must call it, and each encodes a share on its device. Encoders are loaded only if
    something is missing, after the report on the data has been logged. Raises ConfigError if the
    videos or their captions leave nothing to train on, or if the cache's disk is full.
    """
    config, device = job.config, accelerator.device

    def all_true(value: bool) -> bool:
        values: Any = accelerator.gather(torch.tensor([int(value)], device=device))
        return bool(values.all())

    group = ProcessGroup(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        all_true,
    )
    encoders = _FamilyEncoders(job, device, dtype)
    try:
        # One process draws synthetic clips, or downloads a data set from the Hub, for all.
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
            group=group,
            device=_device_name(device),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        encoders.free()


def source_spec(job: Job) -> SourceSpec:
    """Return the source of the job's videos: the settings under `data`, or its synthetic clips."""
    config = job.config
    if is_drawn(config):
        return SourceSpec(path=str(clips_folder(job)))
    assert config.data.path is not None
    names = [field.name for field in fields(SourceSpec) if field.name != "cache_dir"]
    settings = {name: getattr(config.data, name) for name in names}
    return SourceSpec(**settings, cache_dir=config.cache.dir)


def check_clips(job: Job) -> None:
    """Raise ConfigError if no clips are given or synthetic ones of this size cannot be drawn."""
    if job.config.data.path is None and not is_drawn(job.config):
        raise ConfigError(
            "data.path is not set: give the folder of videos with captions, or set "
            "data.source=synthetic:NAME."
        )
    if is_drawn(job.config):
        _clip_set(job)


def clips_folder(job: Job) -> Path:
    """Return the folder of the job's synthetic clips, drawing those that it lacks."""
    config = job.config
    parent = Path(config.cache.dir) / "synthetic"
    return write_folder(_clip_set(job), config.data.synthetic.clips, job.fps, parent)


def _clip_set(job: Job) -> ClipSet:
    """Return the set that the job's clips are drawn from. Raises ConfigError for a bad one."""
    config = job.config
    try:
        arena = Arena(job.frames, config.height, config.width, job.native_frames)
        name = config.data.source.removeprefix(SYNTHETIC)
        return ClipSet(name, arena, config.data.synthetic.seed)
    except ValueError as error:
        raise ConfigError(f"data.source={config.data.source}: {error}") from error


def cache_spec(job: Job, dtype: torch.dtype) -> CacheSpec:
    """Describe the job's clips and the encoders that make them. dtype: of weights and latents."""
    config, data = job.config, job.config.data
    identity = EncoderIdentity(
        family=job.family.name,
        model=config.model.path,
        revision=config.model.revision,
        snapshot=Path(job.model_path).name,
        dtype=str(dtype),
    )
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
    """Return the family's limit of caption tokens.

    Its tokenizer is loaded when the first caption that may be too long is measured.
    """
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
    """Return what is encoded in addition to the clips' captions: prompts and the empty caption.

    The empty caption is the negative prompt of guidance, and replaces dropped captions.
    """
    prompts = config.validate.prompts
    return [*prompts, ""] if prompts or config.train.caption_dropout else []


class _FamilyEncoders:
    """Loads the text encoder or the VAE when it is called, never both at a time.

    That works because all captions are encoded before the first clip.
    """

    def __init__(self, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        self.job, self.device, self.dtype = job, device, dtype
        self._pipe: Any = None
        self._holds = ""

    def text(self, caption: str) -> Text:
        """Encode a caption to named tensors."""
        return self.job.family.text.encode(self._pipeline("text"), caption)

    def video(self, pixels: np.ndarray) -> Tensor:
        """Encode uint8 RGB `[F, H, W, 3]` to latents `[C, f, h, w]`."""
        latents = self.job.family.vae.encode(self._pipeline("vae").vae, torch.from_numpy(pixels))
        return latents.to(self.dtype)

    def free(self) -> None:
        """Free all memory, including blocks that PyTorch's allocator would keep for reuse."""
        self._pipe, self._holds = None, ""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pipeline(self, part: str) -> Any:
        if self._holds != part:
            self.free()  # before the other part is loaded
            self._pipe = self.job.family.loader.load_pipeline(
                self.job.model_path,
                self.job.config.model.revision,
                text=part == "text",
                vae=part == "vae",
                dtype=self.dtype,
            ).to(self.device)
            self._holds = part
        return self._pipe
