"""Check `data.source`: folders, data sets, and clips that are drawn for the run."""

from __future__ import annotations

from pathlib import Path

from ...data.sources import SOURCES
from ...data.synthetic import check_name
from .schema import Config
from .values import ConfigError

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
