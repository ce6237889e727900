"""Define what a source lists: captioned videos, and what cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

VIDEO_SUFFIXES = frozenset(
    (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
)
# Usual names of the columns with captions and with file names.
CAPTIONS, FILES = ("caption", "text"), ("file_name", "video")

# The reasons that the report counts dropped videos by.
Kind = Literal[
    "no caption",
    "no such file",
    "outside the folder",
    "no video extension",
    "repeated",
    "filtered",
    "undecodable",
    "unreadable",
    "too small",
    "too short",
    "crosses a cut",
]


@dataclass(frozen=True, slots=True)
class Source:
    """Describes a captioned video, or the part of one from `start` to `end` seconds.

    name: its path relative to the folder, with forward slashes. end: None for the end of the video.
    columns: the other columns of its row, for `data.filter` and `data.top_k`.
    """

    path: Path
    caption: str
    name: str
    start: float = 0.0
    end: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Dropped:
    """Names a video, part of a video or row of a table that is not trained on, and why."""

    name: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Listing:
    """Holds what a source lists, sorted by name. where: the source's name in messages."""

    where: str
    sources: list[Source]
    dropped: list[Dropped] = field(default_factory=list)


@dataclass(frozen=True)
class SourceSpec:
    """Names a source and how to read it.

    The fields are the settings of the same names under `data`. cache_dir: folder for the files of a
    source that has none of its own.
    """

    path: str
    source: str = "folder"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    video: str | None = None
    caption: str | None = None
    filter: str = ""
    top_k: int | None = None
    top_by: str | None = None
    cache_dir: str = "cache"

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Return the columns that may hold the caption."""
        return (self.caption,) if self.caption else CAPTIONS

    @property
    def file_columns(self) -> tuple[str, ...]:
        """Return the columns that may hold the video's file name."""
        return (self.video,) if self.video else FILES
