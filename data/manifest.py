"""What a folder of videos holds: each video with its caption, and what is unusable, and why."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
)
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("caption", "text")


@dataclass(frozen=True)
class Source:
    """A captioned video; `name` is its path relative to the folder, with forward slashes."""

    path: Path
    caption: str
    name: str


@dataclass(frozen=True)
class Dropped:
    """A video, or a row of a metadata file, that will not be trained on, and the reason."""

    name: str
    reason: str


def too_short(frames: int, fps: float, needed: int) -> str:
    """The reason for dropping a video that shows only `frames` frames at `fps`."""
    return f"{frames / fps:.1f} s = {frames} frames at {fps:g} fps, {needed} needed"


def scan(folder: str | Path) -> tuple[list[Source], list[Dropped]]:
    """The captioned videos of `folder` and its sub-folders sorted by name, and what was left out.

    A caption comes from the row of a `metadata.jsonl` or `metadata.csv` in the video's folder or
    one above it (`file_name`, relative to that file, and `caption` or `text`), else from a `.txt`
    file of the same stem. Hidden files are skipped. No video is opened here.

    Raises ValueError for a missing folder, a folder with no video and a malformed metadata file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: point data.path at a folder of videos with captions")
    files = _visible_files(folder)
    rows, dropped = _read_metadata(folder, files)
    videos = {n for n, path in files.items() if path.suffix.lower() in VIDEO_SUFFIXES}
    if not videos | rows.keys():
        raise ValueError(
            f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}): "
            "point data.path at a folder of videos with captions"
        )
    sources = []
    for name in sorted(videos | rows.keys()):
        caption, reason = rows[name] if name in rows else _sidecar(files[name])
        if caption:
            sources.append(Source(files[name], caption, name))
        else:
            dropped.append(Dropped(name, reason))
    return sources, sorted(dropped, key=lambda item: item.name)


def _visible_files(folder: Path) -> dict[str, Path]:
    """Every file by its name; sorted, so that nothing later depends on the file system's order."""
    found, visited = {}, set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link to a folder above would go round for ever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = Path(parent, name)
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _sidecar(video: Path) -> tuple[str, str]:
    """(caption, reason that there is none) from the text file beside `video`."""
    path = video.with_suffix(".txt")
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return "", f"no caption: neither a row in {' or '.join(METADATA)} nor a file {path.name}"
    except (OSError, UnicodeDecodeError) as error:
        return "", f"no caption: {path.name} cannot be read as UTF-8 text ({error})"
    return caption, f"no caption: {path.name} is empty"


def _read_metadata(
    folder: Path, files: dict[str, Path]
) -> tuple[dict[str, tuple[str, str]], list[Dropped]]:
    """Name of a video -> (caption, reason that there is none), and the rows that were left out."""
    rows: dict[str, tuple[str, str]] = {}
    places: dict[str, str] = {}
    dropped = []
    for name, path in files.items():
        if path.name not in METADATA:
            continue
        if path.name == METADATA[1] and path.with_name(METADATA[0]).exists():
            raise ValueError(f"{path.parent} holds both {' and '.join(METADATA)}: keep one of them")
        for line, row in _rows(path):
            place = f"{name} line {line}"
            file_name = row.get("file_name")
            if not isinstance(file_name, str) or not file_name.strip():
                raise ValueError(
                    f"{path} line {line} has no file_name: "
                    "each row needs file_name (relative to this file) and caption"
                )
            target = os.path.relpath(path.parent / file_name.strip(), folder)
            target = Path(target).as_posix()
            if target in places:
                reason = f"{place} repeats {places[target]}, whose caption is used"
                dropped.append(Dropped(target, reason))
                continue
            if target not in files:
                outside = target.startswith("../")
                what = f"lies outside {folder}" if outside else "there is no such file"
                dropped.append(Dropped(target, f"{place}: {what}"))
                continue
            places[target] = place
            rows[target] = (_caption(row), f"no caption: {place} has none")
    return rows, dropped


def _caption(row: dict) -> str:
    for key in CAPTION_KEYS:
        if isinstance(row.get(key), str) and row[key].strip():
            return row[key].strip()
    return ""


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a metadata file as (line number, row)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                if "file_name" not in (reader.fieldnames or ()):
                    raise ValueError(
                        f"{path} line 1 names no column file_name: "
                        "the columns file_name and caption are needed"
                    )
                yield from ((reader.line_num, row) for row in reader)
            else:
                yield from _json_rows(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV ({error})") from error


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number} is not valid JSON ({error.msg}): mend that line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} line {number} is not a JSON object: "
                'write {"file_name": "a.mp4", "caption": "..."}, one a line'
            )
        yield number, row
