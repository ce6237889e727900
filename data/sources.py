"""Where videos come from: a source lists captioned videos, and says what of it cannot be used.

Nothing is opened here but tables and folders: what the files hold is for `survey.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .filter import parse

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


def _folder(spec: SourceSpec) -> Listing:
    from .folder import list_folder

    return list_folder(spec)


def _openvid(spec: SourceSpec) -> Listing:
    from .openvid import list_openvid

    return list_openvid(spec)


def _datasets(spec: SourceSpec) -> Listing:
    from .hub import list_dataset

    return list_dataset(spec)


# By what stands before a colon in `data.source`; what follows it is the source's own affair.
SOURCES: dict[str, Callable[[SourceSpec], Listing]] = {
    "folder": _folder,
    "openvid": _openvid,
    "datasets": _datasets,
}


def list_videos(spec: SourceSpec) -> Listing:
    """The videos of a source that `data.filter` and `data.top_k` leave.

    Raises ValueError for a source that is unknown, missing or empty, for a malformed table, and for
    a filter that does not parse or names no column.
    """
    name = spec.source.partition(":")[0]
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ValueError(f"data.source={spec.source} is unknown: choose one of {known}")
    if spec.filter:
        parse(spec.filter)  # before minutes of listing
    return select(SOURCES[name](spec), spec.filter, spec.top_k, spec.top_by)


def select(listing: Listing, filter: str, top_k: int | None, top_by: str | None) -> Listing:
    """The sources that `filter` passes, and of these the `top_k` with the greatest `top_by`."""
    sources, dropped = listing.sources, list(listing.dropped)
    if filter:
        rule = parse(filter)
        rule.check_columns({name for source in sources for name in source.columns})
        passed = [rule(source.columns) for source in sources]
        dropped += [
            Dropped(source.name, "filtered", f"data.filter: {rule.explain(source.columns)}")
            for source, passes in zip(sources, passed, strict=True)
            if not passes
        ]
        sources = [source for source, passes in zip(sources, passed, strict=True) if passes]
    if top_k is not None:
        assert top_by is not None
        rule = parse(f'"{top_by}" > 0', what="data.top_by")
        rule.check_columns({name for source in sources for name in source.columns})
        scored = [(rule.number(source.columns, top_by), source) for source in sources]
        ranked = sorted(scored, key=_best_first)
        kept = {id(source) for score, source in ranked[:top_k] if score is not None}
        least = min((s for s, source in ranked if id(source) in kept and s is not None), default=0)
        dropped += [
            Dropped(source.name, "filtered", _not_in_top(score, top_by, top_k, least))
            for score, source in scored
            if id(source) not in kept
        ]
        sources = [source for source in sources if id(source) in kept]
    return replace(listing, sources=sources, dropped=dropped)


def _best_first(scored: tuple[float | None, Source]) -> tuple[bool, float, str, float]:
    score, source = scored
    return score is None, -(score or 0.0), source.name, source.start


def _not_in_top(score: float | None, column: str, top_k: int, least: float) -> str:
    if score is None:
        return f"data.top_k: {column} has no number"
    return f"data.top_k: {column} {score:g} is not among the {top_k} greatest, down to {least:g}"
