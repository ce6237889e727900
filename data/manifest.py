"""Record which files of the cache a run uses, before the cache is filled and when it is complete.

    <cache>/manifests/<key>.jsonl            a line about the settings, then one per clip
    <cache>/manifests/<key>.dropped.jsonl    what was dropped, and why

The next start with the same videos and settings takes its clips from here, after checking that the
files of the cache have not changed. `longreel cache` reads here which files are in use.
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

from .cache import MANIFESTS, SCHEMA, CacheSpec, Entry, short_hash
from .files import read_json_lines, replacing
from .identity import header_value
from .ledger import stamp
from .listing import Dropped, Listing

DROPPED = ".dropped.jsonl"


@dataclass(frozen=True)
class Clip:
    """Names a clip of a manifest and its files, relative to the cache."""

    id: str
    latents: str
    text: str


@dataclass(frozen=True)
class Manifest:
    """Holds a manifest.

    path: its file, whose modification time is the time of its last use. about: its first line, the
    settings and counts.
    """

    path: Path
    about: dict[str, Any]
    clips: list[Clip]

    @property
    def files(self) -> set[str]:
        """Return all files that it names, relative to the cache."""
        return {file for clip in self.clips for file in (clip.latents, clip.text)} | set(
            self.about["texts"]
        )


@dataclass(frozen=True)
class ClipList:
    """Holds the clips of a run, what was dropped, and notes on captions that are cut."""

    entries: list[Entry]
    dropped: list[Dropped]
    notes: list[str]


def listing_hash(listing: Listing) -> str:
    """Hash all that decides which clips the videos give.

    That is the names, sizes and times of the files, captions, spans, and the version of PyAV, which
    decides what can be decoded.
    """
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
    clip_list: ClipList,
    texts: dict[str, Path],
    state: str | None,
) -> Path:
    """Write the manifest of a source and spec, and return its path.

    texts: file of every caption. state: the `listing_hash` under which the next start may use this
    manifest; None if it must look at the videos again, because files are yet to be written or a
    video could not be read for a reason that may pass.
    """
    entries = clip_list.entries
    used = {str(entry.text) for entry in entries}
    places = {(s.name, s.caption): place for place, s in enumerate(listing.sources)}
    about = {
        "where": listing.where,
        "buckets": [str(bucket) for bucket in spec.buckets],
        "fps": spec.fps,
        "windows": spec.windows,
        "video_encoder": header_value(spec.video_encoder),
        "text_encoder": header_value(spec.text_encoder),
        "clips": len(entries),
        "dropped": len(clip_list.dropped),
        "texts": [_relative(path, cache_dir) for path in texts.values() if str(path) not in used],
        "state": state,
        "notes": clip_list.notes,
    }

    def line(entry: Entry) -> list[Any]:
        values = [
            entry.id,
            _relative(entry.latents, cache_dir),
            _relative(entry.text, cache_dir),
            places[(entry.source, entry.caption)],
            spec.buckets.index(entry.bucket),
            entry.start,
            entry.group,
        ]
        if state is not None:
            values += [*_size_and_time(entry.latents), *_size_and_time(entry.text)]
        return values

    path = _path(cache_dir, listing.where, spec)
    reasons = ([item.name, item.kind, item.reason] for item in clip_list.dropped)
    _write(path.with_suffix(DROPPED), reasons)
    _write(path, chain([about], map(line, entries)))
    return path


def read_clip_list(
    cache_dir: Path, listing: Listing, spec: CacheSpec, texts: Sequence[Path], state: str
) -> ClipList | None:
    """Return the clips of the last start with the same settings; None if anything has changed.

    Checked are `state`, the `listing_hash` of the videos, and the sizes and times of all files of
    the cache. texts: files of further captions, which must exist.
    """
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
    if len(dropped) != about["dropped"]:  # another process was writing both files
        return None
    known = {str(entry.text) for entry in entries} if texts else set()
    for text in texts:
        if str(text) not in known and not (_relative(text, cache_dir) in others and text.is_file()):
            return None
    with contextlib.suppress(OSError):  # a cache of another user may be read-only
        os.utime(path)
    return ClipList(entries, dropped, about["notes"])


def _path(cache_dir: Path, where: str, spec: CacheSpec) -> Path:
    """Return the manifest's file, whose name is the hash of the source's name and the spec."""
    shapes = [str(bucket) for bucket in spec.buckets]
    chosen = [spec.windows, spec.stride, spec.least_scale, spec.shots, spec.canonical]
    encoders = [str(spec.video_encoder), str(spec.text_encoder)]
    key = short_hash(SCHEMA, where, shapes, spec.fps, encoders, chosen)[:16]
    return cache_dir / MANIFESTS / f"{key}.jsonl"


def _relative(path: Path, cache_dir: Path) -> str:
    return str(path).removeprefix(f"{cache_dir}/")


def _size_and_time(path: str | Path) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def version(package: str) -> str:
    """Return the version of an installed package without importing it; empty if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def read_manifests(cache_dir: Path) -> list[Manifest]:
    """Return all manifests that can be read, the most recently used first."""
    paths = [p for p in (cache_dir / MANIFESTS).glob("*.jsonl") if not p.name.endswith(DROPPED)]
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
    """Return the first line and the others; None for a file that is missing or malformed."""
    try:
        about, *lines = read_json_lines(path)
    except (OSError, ValueError):
        return None
    return (about, lines) if isinstance(about, dict) else None


def _write(path: Path, values: Iterable[Any]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
