"""Where a run's clips come from, when that is not a folder of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..data.synthetic import Arena, Source, check_name, write_folder
from .config import Config, ConfigError

if TYPE_CHECKING:
    from .job import Job

SYNTHETIC = "synthetic:"


def check_source(config: Config) -> None:
    """Raise ConfigError for a `data.source` that does not exist, or beside a `data.path`."""
    source = config.data.source
    if source is None:
        return
    if config.data.path is not None:
        raise ConfigError(
            f"data.path={config.data.path} and data.source={source} are both set: leave one out."
        )
    if not source.startswith(SYNTHETIC):
        raise ConfigError(
            f"data.source={source} is unknown: take synthetic:NAME, or set data.path."
        )
    try:
        check_name(source.removeprefix(SYNTHETIC))
    except ValueError as error:
        raise ConfigError(f"data.source={error}") from error


def check_clips(job: Job) -> None:
    """Raise ConfigError unless clips of the job's size and length can be drawn."""
    if job.config.data.source is not None:
        _source(job)


def clips_folder(job: Job) -> Path:
    """The folder of videos that a job trains on; synthetic clips are drawn there if need be."""
    config = job.config
    if config.data.source is None:
        assert config.data.path is not None
        return Path(config.data.path)
    parent = Path(config.cache.dir) / "synthetic"
    return write_folder(_source(job), config.data.synthetic.clips, job.fps, parent)


def _source(job: Job) -> Source:
    config = job.config
    assert config.data.source is not None
    try:
        arena = Arena(job.frames, config.height, config.width, job.native_frames)
        name = config.data.source.removeprefix(SYNTHETIC)
        return Source(name, arena, config.data.synthetic.seed)
    except ValueError as error:
        raise ConfigError(f"data.source={config.data.source}: {error}") from error
