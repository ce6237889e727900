"""Where a run's clips come from, when that is not a folder of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...data.sources import SOURCES
from ...data.synthetic import Arena, Source, check_name, write_folder
from .schema import Config, ConfigError

if TYPE_CHECKING:
    from ..job import Job

SYNTHETIC = "synthetic:"


def is_drawn(config: Config) -> bool:
    return config.data.source.startswith(SYNTHETIC)


def check_source(config: Config) -> None:
    """Raise ConfigError for a `data.source` that does not exist, and for a folder that does not."""
    source, path = config.data.source, config.data.path
    if is_drawn(config):
        if path is not None:
            raise ConfigError(f"data.path={path} and data.source={source}: leave one out.")
        try:
            check_name(source.removeprefix(SYNTHETIC))
        except ValueError as error:
            raise ConfigError(f"data.source={error}") from error
    elif source not in SOURCES:
        raise ConfigError(
            f"data.source={source} is unknown: take {', '.join(SOURCES)} or {SYNTHETIC}NAME."
        )
    elif source != "datasets" and path is not None and not Path(path).is_dir():
        raise ConfigError(f"data.path={path} is not a folder.")


def check_clips(job: Job) -> None:
    """Raise ConfigError unless clips of the job's size and length can be drawn."""
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
