"""What a source gives: captioned videos, and what of it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

VIDEO_SUFFIXES = frozenset(
    (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
)
CAPTIONS, FILES = ("caption", "text"), ("file_name", "video")  # names of columns, as found

# What the report counts by.
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
    """A captioned video, or the seconds from `start` to `end` of one (None: its end).

    `name` is its path relative to the folder, with forward slashes; columns: of its row, for
    `data.filter` and `data.top_k`.
    """

    path: Path
    caption: str
    name: str
    start: float = 0.0
    end: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A video, a part of one, or a row of a table that is not trained on, and why."""

    name: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Listing:
    """What a source gives, sorted by name. where: for messages."""

    where: str
    sources: list[Source]
    dropped: list[Dropped] = field(default_factory=list)


@dataclass(frozen=True)
class SourceSpec:
    """Which source, and how to read it; the fields are the settings of the same names under `data`.

    cache_dir: where a source that has no files of its own puts them.
    """

    source: str = "folder"
    path: str = ""
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
        return (self.caption,) if self.caption else CAPTIONS

    @property
    def file_columns(self) -> tuple[str, ...]:
        return (self.video,) if self.video else FILES
