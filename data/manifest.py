"""What a run uses of the cache, written before it is filled and when it is complete.

    <cache>/manifests/<key>.jsonl            a line about the settings, then one a clip
    <cache>/manifests/<key>.dropped.jsonl    what was dropped, and why

The next start with the same videos and settings takes its clips from here, and only looks whether
the files of the cache are as they were; `longreel cache` knows by it what is in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from .cache import SCHEMA, CacheSpec, Entry, short_hash
from .files import read_json_lines, replacing
from .ledger import stamp
from .listing import Dropped, Listing

FOLDER = "manifests"
DROPPED = ".dropped.jsonl"


@dataclass(frozen=True)
class Clip:
    """A clip of a manifest; files are relative to the cache."""

    id: str
    latents: str
    text: str


@dataclass(frozen=True)
class Manifest:
    """path: of its file, whose time is when it was used last. about: the settings in words."""

    path: Path
    about: dict[str, Any]
    clips: list[Clip]

    @property
    def files(self) -> set[str]:
        """All that it names, relative to the cache."""
        return {file for clip in self.clips for file in (clip.latents, clip.text)} | set(
            self.about["texts"]
        )


@dataclass(frozen=True)
class Ready:
    """What a start takes from a manifest."""

    entries: list[Entry]
    dropped: list[Dropped]
    notes: list[str]


def state(listing: Listing) -> str:
    """A hash of all that decides which clips the videos give: names, sizes and times of the files,
    captions, times in them, and the PyAV that says what cannot be decoded."""
    digest = hashlib.sha1(f"{SCHEMA} {version('av')}".encode(), usedforsecurity=False)
    for source in listing.sources:
        try:
            now: object = stamp(source.path)
        except OSError as error:
            now = error.errno
        about = (source.name, source.caption, source.start, source.end, now, str(source.path))
        digest.update(repr(about).encode())
    for item in listing.dropped:
        digest.update(repr((item.name, item.kind, item.reason)).encode())
    return digest.hexdigest()


def write_manifest(
    cache_dir: Path,
    listing: Listing,
    spec: CacheSpec,
    ready: Ready,
    texts: dict[str, Path],
    state: str | None,
) -> Path:
    """One file for each source and spec. state: None if a start must look at the videos again: the
    files are yet to be written, or a video could not be read for a reason that may pass."""
    entries = ready.entries
    used = {str(entry.text) for entry in entries}
    places = {(s.name, s.caption): place for place, s in enumerate(listing.sources)}
    about = {
        "where": listing.where,
        "buckets": [str(bucket) for bucket in spec.buckets],
        "fps": spec.fps,
        "windows": spec.windows,
        "video_encoder": spec.video_encoder,
        "text_encoder": spec.text_encoder,
        "clips": len(entries),
        "dropped": len(ready.dropped),
        "texts": [_relative(path, cache_dir) for path in texts.values() if str(path) not in used],
        "state": state,
        "notes": ready.notes,
    }

    def line(entry: Entry) -> list[Any]:
        about = [
            entry.id,
            _relative(entry.latents, cache_dir),
            _relative(entry.text, cache_dir),
            places[(entry.source, entry.caption)],
            spec.buckets.index(entry.bucket),
            entry.start,
            entry.group,
        ]
        if state is not None:
            about += [*_size_and_time(entry.latents), *_size_and_time(entry.text)]
        return about

    path = _path(cache_dir, listing.where, spec)
    reasons = ([item.name, item.kind, item.reason] for item in ready.dropped)
    _write(path.with_suffix(DROPPED), reasons)
    _write(path, chain([about], map(line, entries)))
    return path


def read_ready(
    cache_dir: Path, listing: Listing, spec: CacheSpec, texts: Sequence[Path], state: str
) -> Ready | None:
    """The clips of the last start, if videos, settings and all files of the cache are as they were
    then, `texts` among them; else None."""
    path = _path(cache_dir, listing.where, spec)
    read = _lines(path)
    if read is None or read[0].get("state") != state:
        return None
    about, lines = read
    others = set(about["texts"])
    root, entries = str(cache_dir), []
    try:
        for name, latents, text, place, bucket, start, group, *times in lines:
            files = (f"{root}/{latents}", f"{root}/{text}")
            if [*_size_and_time(files[0]), *_size_and_time(files[1])] != times:
                return None
            source = listing.sources[place]
            shape = spec.buckets[bucket]
            entries.append(
                Entry(
                    name,
                    source.name,
                    Path(files[0]),
                    Path(files[1]),
                    source.caption,
                    start,
                    shape,
                    group,
                )
            )
        dropped = [Dropped(*item) for item in read_json_lines(path.with_suffix(DROPPED))]
    except (OSError, ValueError, TypeError, IndexError):
        return None
    if len(dropped) != about["dropped"]:  # of another process that wrote both at the same time
        return None
    known = {str(entry.text) for entry in entries} if texts else set()
    for text in texts:
        if str(text) not in known and not (_relative(text, cache_dir) in others and text.is_file()):
            return None
    with contextlib.suppress(OSError):  # another's cache may be there to read only
        os.utime(path)
    return Ready(entries, dropped, about["notes"])


def _path(cache_dir: Path, where: str, spec: CacheSpec) -> Path:
    shapes = [str(bucket) for bucket in spec.buckets]
    chosen = [spec.windows, spec.stride, spec.least_scale, spec.shots, spec.canonical]
    encoders = [spec.video_encoder, spec.text_encoder]
    key = short_hash(SCHEMA, where, shapes, spec.fps, encoders, chosen)[:16]
    return cache_dir / FOLDER / f"{key}.jsonl"


def _relative(path: Path, cache_dir: Path) -> str:
    return str(path).removeprefix(f"{cache_dir}/")


def _size_and_time(path: str | Path) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def version(package: str) -> str:
    """Of an installed package, without importing it; empty if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def read_manifests(cache_dir: Path) -> list[Manifest]:
    """All that can be read, the one used last first."""
    paths = [p for p in (cache_dir / FOLDER).glob("*.jsonl") if not p.name.endswith(DROPPED)]
    paths.sort(key=lambda path: (-path.stat().st_mtime_ns, path.name))
    return [manifest for manifest in map(_read, paths) if manifest is not None]


def _read(path: Path) -> Manifest | None:
    read = _lines(path)
    if read is None or "texts" not in read[0]:
        return None
    try:
        return Manifest(path, read[0], [Clip(*line[:3]) for line in read[1]])
    except TypeError:
        return None


def _lines(path: Path) -> tuple[dict[str, Any], list[list[Any]]] | None:
    """The first line and the others, None for a file that is missing or not ours."""
    try:
        about, *lines = read_json_lines(path)
    except (OSError, ValueError):
        return None
    return (about, lines) if isinstance(about, dict) else None


def _write(path: Path, values: Iterable[Any]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
