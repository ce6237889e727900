"""Read the rows of metadata.jsonl, .csv and .parquet, with line numbers for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .filter import as_number

Row = dict[str, Any]


def read_rows(path: Path, needed: Iterable[str] = ()) -> Iterator[tuple[int, Row]]:
    """Yield (line or row number, row).

    needed: columns of which a table with a header must have at least one. Raises ValueError, naming
    file and line, if the table is malformed.
    """
    match path.suffix:
        case ".parquet":
            yield from _parquet_rows(path, tuple(needed))
        case ".csv":
            yield from _csv_rows(path, tuple(needed))
        case _:
            yield from _json_rows(path)


def first_text(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """Return the first non-empty text among `columns`, stripped; empty if there is none."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def span(row: Mapping[str, Any], place: str) -> tuple[float, float | None]:
    """Return `start` and `end` in seconds. Raises ValueError, naming `place`, for bad times."""
    if "start" not in row and "end" not in row:
        return 0.0, None
    start, end = (_seconds(row, key, place) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"{place}: end={end:g} is not after start={start or 0.0:g}")
    return start or 0.0, end


def _seconds(row: Mapping[str, Any], key: str, place: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    number = as_number(value)
    if number is None or number < 0:
        raise ValueError(f"{place}: {key}={value!r} is not a time in seconds, 0 or more")
    return number


def _csv_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_head(path, "line 1", reader.fieldnames or (), needed)
            for row in reader:
                if None in row:  # the rest of a caption, which would be lost silently
                    raise ValueError(
                        f"{path} line {reader.line_num} has more fields than line 1 has names: put "
                        'captions with commas in double quotes, as "a dog, running"'
                    )
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(path, number, line)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {number} is not valid JSON ({error.msg}): fix that line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{path} line {number} is not a JSON object: "
            'write {"file_name": "a.mp4", "caption": "..."}, one a line'
        )
    return row


def _parquet_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow: pip install 'longreel[datasets]', or save the "
            "table as metadata.jsonl"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_head(path, "its schema", file.schema_arrow.names, needed)
            for batch in file.iter_batches(batch_size=8192):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not valid Parquet ({reason})") from error


def _check_head(path: Path, where: str, columns: Iterable[str], needed: tuple[str, ...]) -> None:
    """Raise ValueError if a table's header has none of the columns `needed`."""
    columns = list(columns)
    if needed and not set(needed) & set(columns):
        raise ValueError(
            f"{path} {where} names no column {' or '.join(needed)}, but "
            f"{', '.join(columns) or 'nothing'}: the video's file name and its caption are needed; "
            "set data.video and data.caption if their columns have other names"
        )


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8")
