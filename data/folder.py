"""List a folder of videos with captions in text files beside them or in a table."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .listing import VIDEO_SUFFIXES, Dropped, Kind, Listing, Source, SourceSpec
from .tables import first_text, read_rows, span

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECAR = ".txt"
NOT_VIDEOS = frozenset((SIDECAR, ".json", ".npz", ".srt", ".vtt", ".jpg", ".jpeg", ".png", ".webp"))


def list_folder(spec: SourceSpec) -> Listing:
    """List the captioned videos of a folder and its sub-folders, and what was left out.

    Captions come from the rows of a metadata.jsonl, .csv or .parquet in the video's folder or one
    above it. A row has `file_name` or `video`, relative to the table, `caption` or `text`, and
    optionally `start` and `end` in seconds; a video may have several rows. Videos without a row
    take their caption from a `.txt` file of the same stem. Hidden files are skipped.

    Raises ValueError for a missing folder, a folder without videos and a malformed table.
    """
    folder = Path(spec.path)
    check_folder(folder)
    files = visible_files(folder)
    rows, dropped = _read_tables(folder, files, spec)
    videos = {name for name in files if suffix(name) in VIDEO_SUFFIXES}
    if not videos and not rows:
        raise ValueError(
            f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}): "
            "point data.path at a folder of videos with captions"
        )
    sources = []
    for name in sorted(videos | rows.keys()):
        path = Path(f"{folder}/{name}")
        for row in rows.get(name) or [_sidecar(path)]:
            if row.caption:
                sources.append(Source(path, row.caption, name, row.start, row.end, row.columns))
            else:
                dropped.append(Dropped(name, "no caption", row.reason))
    dropped += _unknown_extensions(files, videos | rows.keys())
    return Listing(str(folder), sources, sorted(dropped, key=lambda item: item.name))


def check_folder(folder: Path) -> None:
    """Raise ValueError if `folder` is not a folder."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: point data.path at a folder of videos with captions")


def visible_files(folder: Path) -> dict[str, None]:
    """Return the relative names of all files, sorted so that the file system's order is irrelevant.

    Links are followed, but no folder is entered twice. The result is a dict for fast look-ups.
    """
    return dict.fromkeys(sorted(_walk(folder)))


def _walk(folder: Path) -> Iterator[str]:
    visited: set[str] = set()
    root = os.fspath(folder)
    for parent, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link to a parent folder would loop forever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = os.path.relpath(parent, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        yield from (prefix + name for name in names if not name.startswith("."))


def suffix(name: str) -> str:
    """Return the extension in lower case, with its dot."""
    return posixpath.splitext(name)[1].lower()


@dataclass(frozen=True, slots=True)
class _Row:
    """Holds what a table or text file says about a video.

    reason: why it has no caption, used if `caption` is empty.
    """

    caption: str
    reason: str
    columns: dict[str, Any]
    start: float = 0.0
    end: float | None = None


def _sidecar(video: Path) -> _Row:
    """Read the caption of a video from the text file beside it."""
    path = video.with_suffix(SIDECAR)
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        tables = ", ".join(METADATA[:-1]) + f" or {METADATA[-1]}"
        return _Row("", f"neither a row in {tables} nor a file {path.name}", {})
    except (OSError, UnicodeDecodeError) as error:
        return _Row("", f"{path.name} cannot be read as UTF-8 text ({error})", {})
    return _Row(caption, f"{path.name} is empty", {})


def _unknown_extensions(files: dict[str, None], used: set[str]) -> Iterator[Dropped]:
    """Yield files that have a caption but no known extension and would be ignored silently."""
    stems = {posixpath.splitext(name)[0] for name in used}
    for name in files:
        stem, extension = posixpath.splitext(name)
        if name in used or extension.lower() in NOT_VIDEOS or stem in stems:
            continue
        if stem + SIDECAR in files:
            known = ", ".join(sorted(VIDEO_SUFFIXES))
            reason = f"{extension or 'none'} is not among {known}: rename it, or name it in a table"
            yield Dropped(name, "no video extension", reason)


def _read_tables(
    folder: Path, files: dict[str, None], spec: SourceSpec
) -> tuple[dict[str, list[_Row]], list[Dropped]]:
    """Return the rows of all tables by the video's name, and the rows that were left out."""
    rows: dict[str, list[_Row]] = {}
    places: dict[tuple[str, float, float | None], str] = {}
    dropped = []
    names, captions = spec.file_columns, spec.caption_columns
    root = os.path.abspath(folder).replace(os.sep, "/")
    for table in [name for name in files if posixpath.basename(name) in METADATA]:
        path = Path(folder, table)
        _check_only_table(path)
        parent = posixpath.dirname(table)
        for number, row in read_rows(path, names):
            place = f"{table} {'row' if path.suffix == '.parquet' else 'line'} {number}"
            file_name = _file_name(row, names)
            if not file_name:
                raise ValueError(
                    f"{path.parent / place.removeprefix(parent).lstrip('/')} has no {names[0]}: "
                    f"each row needs {names[0]} (relative to this file) and {captions[0]}"
                )
            target = _target(file_name, parent, root)
            if target not in files:
                outside = target.startswith(("../", "/"))
                what = f"lies outside {folder}" if outside else "there is no such file"
                kind: Kind = "outside the folder" if outside else "no such file"
                dropped.append(Dropped(target, kind, f"{place}: {what}"))
                continue
            start, end = span(row, f"{folder}: {place}")
            first = places.setdefault((target, start, end), place)
            if first != place:
                reason = f"{place} repeats {first}, whose caption is used"
                dropped.append(Dropped(target, "repeated", reason))
                continue
            caption = first_text(row, captions)
            columns = {key: row[key] for key in row if key not in names and key not in captions}
            columns[captions[0]] = caption
            reason = f"{place} has none"
            rows.setdefault(target, []).append(_Row(caption, reason, columns, start, end))
    return rows, dropped


def _check_only_table(path: Path) -> None:
    """Raise ValueError if a folder holds tables of two formats."""
    others = [name for name in METADATA if name != path.name and path.with_name(name).exists()]
    if others:
        both = " and ".join(sorted([path.name, *others], key=METADATA.index))
        raise ValueError(f"{path.parent} holds both {both}: keep one of them")


def _file_name(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """Return a row's file name; `datasets` writes such a column as {"path": ...}."""
    for column in columns:
        value = row.get(column)
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def _target(file_name: str, parent: str, root: str) -> str:
    """Return a table's `file_name` relative to the listed folder instead of the table."""
    plain = file_name.partition("/")
    if not plain[1] and "\\" not in file_name and file_name not in (".", ".."):
        return (
            f"{parent}/{file_name}" if parent else file_name
        )  # the usual case, fast for 100,000 rows
    joined = posixpath.normpath(posixpath.join(root, parent, file_name.replace("\\", "/")))
    if joined.startswith(root + "/"):
        return joined[len(root) + 1 :]
    return posixpath.relpath(joined, root)
