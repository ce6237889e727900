"""List a data set of the `datasets` library, by its name on the Hub or from a local copy.

The data set is streamed once, undecoded. Videos that it holds as bytes are written to the cache;
files on this machine are used where they are. The list is stored, so that a run with a full cache
does not import `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import DISK_FULL, explain_full_disk, read_json_lines, replacing
from .folder import suffix
from .listing import VIDEO_SUFFIXES, Dropped, Listing, Source, SourceSpec
from .tables import first_text, span

log = logging.getLogger(__name__)

SIMPLE = (str, int, float, bool)  # types of the columns that are kept for filters
SCHEMA = 1  # increase it with every change of the stored list


def list_dataset(spec: SourceSpec) -> Listing:
    """List the captioned videos of a split.

    Raises ValueError if `datasets` is not installed, the data set or split cannot be loaded, or it
    has no column of videos.
    """
    where = f"{spec.path} ({spec.split})"
    file = _list_file(spec)
    rows = _read(file)
    if rows is None:
        with explain_full_disk(Path(spec.cache_dir).absolute()):
            rows = _write(file, _stream(spec))
        log.info(f"{where}: {len(rows)} rows; delete {file} to read the data set again.")
    sources, dropped = [], []
    for row in rows:
        if row["reason"]:
            dropped.append(Dropped(row["name"], row["kind"], row["reason"]))
        else:
            start, end = span(row["columns"], f"{where} row {row['name']}")
            path = Path(row["path"])
            source = Source(path, row["caption"], row["name"], start, end, row["columns"])
            sources.append(source)
    if not rows:
        raise ValueError(f"{where} has no row: choose another data.split")
    return Listing(where, sources, dropped)


def _list_file(spec: SourceSpec) -> Path:
    """Return the file of the stored list; local copies are distinguished by sizes and times."""
    local = Path(spec.path)
    stamps: list[tuple[str, int, int]] = []
    if local.is_dir():
        files = [path for path in sorted(local.rglob("*")) if path.is_file()]
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    asked = [SCHEMA, spec.path, spec.subset, spec.split, spec.revision, spec.video, spec.caption]
    digest = hashlib.sha1(json.dumps([*asked, stamps]).encode(), usedforsecurity=False).hexdigest()
    return Path(spec.cache_dir, "lists", f"{digest[:16]}.jsonl")


def _read(file: Path) -> list[dict[str, Any]] | None:
    """Return the list that an earlier run stored; None if a file that it names is gone."""
    try:
        rows = list(read_json_lines(file))
    except (OSError, ValueError):
        return None
    there = all(row["reason"] or Path(row["path"]).exists() for row in rows)
    return rows if there else None


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Store the list and return its rows."""
    kept = []
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            kept.append(row)
    return kept


def _stream(spec: SourceSpec) -> Iterator[dict[str, Any]]:
    """Yield a plain row for each row of the data set, storing videos that it holds as bytes."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data.source=datasets needs the datasets library: pip install 'longreel[datasets]'"
        ) from error
    try:
        split: Any = datasets.load_dataset(
            spec.path, spec.subset, split=spec.split, revision=spec.revision, streaming=True
        )
    except Exception as error:  # datasets and the Hub client raise many types
        raise ValueError(
            f"data.path={spec.path}: datasets cannot load it ({_line(error)}); data.path is a name "
            "on the Hub or a local folder, data.subset and data.split choose a part"
        ) from error
    with _reading(spec):  # CSV and JSON reveal their columns only when read
        features = dict(split.features or dict.fromkeys(next(iter(split), {})))
    column = spec.video or _video_column(features, datasets)
    if features and column not in features:
        raise ValueError(
            f"data.video={column}: {spec.path} has no such column; there are {', '.join(features)}"
        )
    if isinstance(features.get(column), datasets.Video):
        split = split.cast_column(column, datasets.Video(decode=False))
    with _reading(spec):
        for index, row in enumerate(split):
            yield _plain_row(index, row, column, spec)


@contextmanager
def _reading(spec: SourceSpec) -> Iterator[None]:
    """Turn errors of reading into a ValueError that names the data set and the split."""
    try:
        yield
    except Exception as error:  # datasets, the Hub client and Arrow raise many types
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise ValueError(
            f"data.path={spec.path}: datasets cannot read split {spec.split} to its end "
            f"({_line(error)}); run again, or fix the files"
        ) from error


def _line(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _video_column(features: dict[str, Any], datasets: Any) -> str:
    """Return the column of videos, by its type or else by its name."""
    videos = [name for name, kind in features.items() if isinstance(kind, datasets.Video)]
    named = [name for name in ("video", "mp4", "file_name") if name in features]
    if not videos and not named:
        have = ", ".join(features) or "unknown"
        raise ValueError(
            f"data.video: no column of videos was found; the columns are {have}; set it to one"
        )
    return [*videos, *named][0]


def _plain_row(index: int, row: dict[str, Any], column: str, spec: SourceSpec) -> dict[str, Any]:
    """Convert a row to JSON values: name, caption, columns, path, and why it is dropped, if so."""
    value = row.get(column)
    video = value if isinstance(value, dict) else {"path": value, "bytes": None}
    if isinstance(value, bytes):
        video = {"path": None, "bytes": value}
    given = video.get("path") or ""
    columns = {key: x for key, x in row.items() if key != column and isinstance(x, SIMPLE)}
    caption = first_text(row, (*spec.caption_columns, "txt"))
    name = f"{index:06d}" + (f" {Path(given).name}" if given else "")
    plain = {"name": name, "caption": caption, "columns": columns, "path": given}
    plain |= {"kind": "no caption", "reason": ""}
    if not caption:
        plain["reason"] = f"the columns {' and '.join(spec.caption_columns)} are empty"
    elif video.get("bytes"):
        plain["path"] = str(_store(video["bytes"], given, Path(spec.cache_dir)))
    elif not given or not Path(given).exists():
        what = f"{given} is not on this machine, and" if given else "there is no path, and"
        plain |= {"kind": "no such file", "reason": f"{what} the row holds no bytes"}
    return plain


def _store(content: bytes, given: str, cache_dir: Path) -> Path:
    """Write a video's bytes to the cache, named by their hash, and return the file."""
    digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    extension = suffix(given) if suffix(given) in VIDEO_SUFFIXES else ".mp4"
    path = cache_dir.absolute() / "videos" / digest[:2] / f"{digest}{extension}"
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return path
