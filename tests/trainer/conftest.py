"""A folder of small real video files, and runs small enough to repeat in a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import arguments_of
from videos import write_waves


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 17 frames at 16 fps with captions."""
    return write_waves(tmp_path_factory.mktemp("videos"), 3, 17, 64, 64, 16)


@pytest.fixture(scope="session")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of the size and length that the tiny recipes train on."""
    return write_waves(tmp_path_factory.mktemp("waves"), 4, 120, 192, 224, 30)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(videos: Path, cache: Path, tmp_path: Path) -> list[str]:
    return arguments_of("wan", videos, cache, tmp_path / "run")
