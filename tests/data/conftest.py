"""Fixtures: a folder of small real video files, and the path of their cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_cache import add


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make three videos of 20, 30 and 9 frames, two of them with the same caption."""
    folder = tmp_path / "videos"
    add(folder, "a.mp4", 20, "a dog")
    add(folder, "b.mp4", 30, "a cat")
    add(folder, "deep/c.mp4", 9, "a dog")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
