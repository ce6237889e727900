"""Check the tensor files of a cache against what their headers promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import SCHEMA, cache_files
from .files import UNREADABLE, digest, read_tensors


@dataclass(frozen=True)
class Checked:
    """Holds the outcome of checking one file: its size in bytes, and its fault or None."""

    path: Path
    size: int
    fault: str | None


def verify_files(cache_dir: Path) -> Iterator[Checked]:
    """Read every tensor file of the cache and yield what is wrong with it.

    A file is damaged if it cannot be read, is of another schema, holds NaN or infinity, or if its
    tensors differ from the checksum in its header.
    """
    for path in cache_files(cache_dir, "latents", "text"):
        fault = find_fault(path)
        yield Checked(path, path.stat().st_size if path.exists() else 0, fault)


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a tensor file, None if nothing."""
    try:
        tensors, header = read_tensors(path)
    except UNREADABLE as error:
        return f"cannot be read ({error})"
    if header.get("schema") != SCHEMA:
        return f"is of schema {header.get('schema')}, not {SCHEMA}"
    if not all(bool(x.isfinite().all()) for x in tensors.values() if x.is_floating_point()):
        return "holds NaN or infinity"
    if header.get("sha1") != digest(tensors):
        return "its tensors differ from what was written"
    return None
