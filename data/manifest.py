"""Which files of the cache a run uses, for `longreel cache`: written with every start.

<cache>/manifests/<key>.jsonl            a line about the settings, then one a clip
<cache>/manifests/<key>.dropped.jsonl    what was dropped, and why
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import CacheSpec, Entry, short_hash
from .files import replacing
from .sources import Dropped

FOLDER = "manifests"
DROPPED = ".dropped.jsonl"


@dataclass(frozen=True)
class Clip:
    """A line of a manifest; files are relative to the cache."""

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


def write_manifest(
    cache_dir: Path,
    where: str,
    spec: CacheSpec,
    entries: list[Entry],
    texts: dict[str, Path],
    dropped: list[Dropped],
) -> Path:
    """One file for each source and spec; an unchanged one only gets a new time."""
    prefix = f"{cache_dir}/"

    def relative(path: Path) -> str:
        return str(path).removeprefix(prefix)

    used = {entry.text for entry in entries}
    about = {
        "where": str(where),
        "buckets": [str(bucket) for bucket in spec.buckets],
        "fps": spec.fps,
        "windows": spec.windows,
        "video_encoder": spec.video_encoder,
        "text_encoder": spec.text_encoder,
        "clips": len(entries),
        "dropped": len(dropped),
        "texts": [relative(path) for path in texts.values() if path not in used],
    }
    chosen = [spec.stride, spec.least_scale, spec.shots, spec.canonical]
    identity = [about[key] for key in ("where", "buckets", "fps", "windows", "video_encoder")]
    key = short_hash(*identity, spec.text_encoder, *chosen)[:16]
    lines = [json.dumps(about)]
    lines += [json.dumps([e.id, relative(e.latents), relative(e.text)]) for e in entries]
    path = cache_dir / FOLDER / f"{key}.jsonl"
    reasons = [json.dumps([item.name, item.kind, item.reason]) for item in dropped]
    _write(path, lines)
    _write(path.with_suffix(DROPPED), reasons)
    return path


def read_manifests(cache_dir: Path) -> list[Manifest]:
    """All that can be read, the one used last first."""
    paths = [p for p in (cache_dir / FOLDER).glob("*.jsonl") if not p.name.endswith(DROPPED)]
    paths.sort(key=lambda path: (-path.stat().st_mtime_ns, path.name))
    return [manifest for manifest in map(_read, paths) if manifest is not None]


def _read(path: Path) -> Manifest | None:
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        clips = [Clip(*fields) for fields in json.loads("[" + ",".join(lines) + "]")]
        about = json.loads(first)
    except (OSError, ValueError, TypeError):
        return None
    return Manifest(path, about, clips) if "texts" in about else None


def _write(path: Path, lines: list[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    try:
        unchanged = path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        unchanged = False
    if unchanged:
        os.utime(path)
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
