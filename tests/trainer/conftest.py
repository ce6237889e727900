"""A folder of small real video files, and runs small enough to repeat in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runs import arguments_of

from longreel.data.decode import write_video


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 17 frames at 16 fps with captions."""
    folder = tmp_path_factory.mktemp("videos")
    y, x = np.mgrid[:64, :64]
    for index in range(3):
        shift = np.arange(17)[:, None, None] * (index + 1)
        waves = [np.sin((x + shift) / (5 + index + c)) * np.cos(y / 7) for c in range(3)]
        frames = (127 + 100 * np.stack(waves, -1)).astype(np.uint8)
        write_video(folder / f"{index}.mp4", frames, 16)
        (folder / f"{index}.txt").write_text(f"waves number {index}")
    return folder


@pytest.fixture(scope="session")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of moving waves, of the size and length that the tiny recipes train on."""
    folder = tmp_path_factory.mktemp("waves")
    y, x = np.mgrid[:192, :224]
    for index in range(4):
        shift = np.arange(120)[:, None, None] * (index + 1)
        moving = [np.sin((x + shift) / (9 + index + c)) * np.cos(y / 12) for c in range(3)]
        frames = (127 + 100 * np.stack(moving, -1)).astype(np.uint8)
        write_video(folder / f"{index}.mp4", frames, 30)
        (folder / f"{index}.txt").write_text(f"waves number {index}")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(videos: Path, cache: Path, tmp_path: Path) -> list[str]:
    return arguments_of("wan", videos, cache, tmp_path / "run")
