"""Find and delete the files of a cache that no recent run uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import FOLDERS, cache_files
from .manifest import Manifest, read_manifests

DAY = 24 * 3600.0  # seconds


@dataclass(frozen=True)
class Unused:
    """Holds the outcome of `find_unused`.

    recent: manifests of the runs whose files are kept. old: number of the other manifests.
    files: paths that may be deleted. size: their total size in bytes.
    """

    recent: list[Manifest]
    old: int
    files: list[Path]
    size: int

    def delete(self) -> None:
        """Delete the files; one that another process has deleted meanwhile is no error."""
        for path in self.files:
            path.unlink(missing_ok=True)


def find_unused(cache_dir: Path, days: float = 30.0) -> Unused:
    """Find the files that no run started in the last `days` days uses, and old temporary files.

    Temporary files are old after a day: killed processes left them. Copies of videos are kept while
    any run is recent, and go with the last one, because only encoding needs them. Raises ValueError
    if `days` is negative, or if the cache has no manifest, so that nothing is known about its use.
    """
    if days < 0:
        raise ValueError(f"days={days} must not be negative.")
    now = time.time()
    manifests = read_manifests(cache_dir)
    if not manifests:
        raise ValueError(
            f"dir={cache_dir} has no manifest, so nothing is known about what is in use: start a "
            "run with this cache first, or delete the folder."
        )
    recent = [m for m in manifests if now - m.path.stat().st_mtime <= days * DAY]
    used = set().union(*(manifest.files for manifest in recent))
    files = [
        path
        for path in cache_files(cache_dir, "latents", "text")
        if path.relative_to(cache_dir).as_posix() not in used
    ]
    files += [path for path in _temporary(cache_dir) if now - path.stat().st_mtime > DAY]
    if not recent:
        files += list(cache_files(cache_dir, "canonical", "videos"))
    files += [m.path for m in manifests if m not in recent]
    size = sum(path.stat().st_size for path in files)
    return Unused(recent, len(manifests) - len(recent), files, size)


def _temporary(cache_dir: Path) -> Iterator[Path]:
    """Yield the temporary files of processes that are writing or were killed."""
    for folder in FOLDERS:
        yield from sorted((cache_dir / folder).rglob(".*.tmp"))
