"""Define the layout and the keys of the cache of latents and text embeddings.

    <cache>/latents/<video key>/<aa>/<sha1>.safetensors    one clip
    <cache>/text/<text key>/<aa>/<sha1>.safetensors        one caption
    <cache>/canonical/<rate>/<aa>/<sha1>.mp4               copies of videos (canonical.py)
    <cache>/videos/<aa>/<sha1>.<extension>                 videos of the Hub (hub.py)
    <cache>/ledger/                                        facts about files (ledger.py)
    <cache>/manifests/<key>.jsonl                          which files a run uses (manifest.py)

A key is the hash of everything that shaped the tensors, so a changed setting never finds a stale
file. Files are renamed into place once complete: a build that was killed continues where it
stopped, and several processes may build at once. Using a complete cache needs neither PyAV nor the
encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .files import UNREADABLE, read_header
from .identity import EncoderIdentity
from .ledger import FOLDER as LEDGER
from .ledger import Ledger, stamp

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCHEMA = 2  # increase it with every change of what the tensors or the files hold
MANIFESTS = "manifests"
CONTENT_FOLDERS = ("latents", "text", "canonical", "videos")
FOLDERS = (*CONTENT_FOLDERS, LEDGER, MANIFESTS)


@dataclass(frozen=True, order=True)
class Bucket:
    """Holds a shape that clips are brought to: `frames` frames of `height` x `width` pixels.

    tokens, bytes: size of one clip in the transformer and in the cache, for the report.
    """

    frames: int
    height: int
    width: int
    tokens: int = field(default=0, compare=False)
    bytes: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"

    @property
    def pixels(self) -> int:
        """Return the pixels of one clip, over all frames."""
        return self.frames * self.height * self.width

    def enlarges(self, height: int, width: int) -> float:
        """Return the factor by which a picture must be enlarged to cover the bucket."""
        return max(self.height / height, self.width / width)


@dataclass(frozen=True)
class CacheSpec:
    """Describes the clips of a cache and the encoders that make them.

    buckets: the shapes; a video gets the one nearest to its aspect, and the longest that fits.
    fps: frame rate of the clips. video_encoder, text_encoder: identity or name, which must change
    with anything that changes the encoder's output. windows: "first" takes the first clip of each
    video, "all" takes a clip every `stride` frames (0: no overlap) as long as it is complete.
    least_scale: smallest share of the bucket's height and width that a video must have. shots: no
    clip crosses a cut. canonical: decode a copy of constant frame rate, which is made once.
    Raises ValueError for impossible values.
    """

    buckets: tuple[Bucket, ...]
    fps: float
    video_encoder: EncoderIdentity | str
    text_encoder: EncoderIdentity | str
    windows: Literal["first", "all"] = "first"
    stride: int = 0
    least_scale: float = 0.0
    shots: bool = False
    canonical: bool = False

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("buckets is empty: give at least one")
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}: it must be above 0")
        if self.windows not in ("first", "all"):
            raise ValueError(f"windows is {self.windows!r}: choose 'first' or 'all'")
        if self.stride < 0:
            raise ValueError(
                f"stride is {self.stride}: give frames between clips, 0 for no overlap"
            )

    def video_key(self, bucket: Bucket) -> str:
        """Return the key of a bucket's latents.

        Settings that only choose clips are not part of it: a clip is the same wherever its
        neighbours begin.
        """
        return self._video_keys[bucket]

    @cached_property
    def _video_keys(self) -> dict[Bucket, str]:
        copied = ("canonical",) if self.canonical else ()
        rest = (float(self.fps), str(self.video_encoder), *copied)
        return {
            bucket: short_hash(SCHEMA, bucket.frames, bucket.height, bucket.width, *rest)[:16]
            for bucket in self.buckets
        }

    @cached_property
    def text_key(self) -> str:
        """Return the key of text embeddings."""
        return short_hash(SCHEMA, str(self.text_encoder))[:16]

    def latents_path(self, cache_dir: Path, bucket: Bucket, fingerprint: str, start: int) -> Path:
        """Return the file of the clip that begins at frame `start` of a video's content."""
        name = short_hash(fingerprint, start)
        folder = f"{cache_dir}/latents/{self.video_key(bucket)}"  # faster than joining Paths
        return Path(f"{folder}/{name[:2]}/{name}.safetensors")

    def text_path(self, cache_dir: Path, caption: str) -> Path:
        """Return the file of a caption's embedding."""
        name = short_hash(caption)
        return Path(f"{cache_dir}/text/{self.text_key}/{name[:2]}/{name}.safetensors")


@dataclass
class Encoders:
    """Holds the two encoders that fill the cache.

    video: uint8 RGB `[F, H, W, 3]` -> latents `[C, f, h, w]`. text: caption -> named tensors.
    Tensors are stored in the dtype they come in. All captions are encoded before the first clip,
    so a text encoder may be loaded at its first call and freed at the first call of `video`.
    """

    video: Callable[[np.ndarray], Tensor]
    text: Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Entry:
    """Describes a cached clip, which begins at frame `start` of the video named `source`.

    id: `source@start`. latents, text: files of the clip and of its caption's embedding. group: name
    of the first video with the same content, which all copies of a video share.
    """

    id: str
    source: str
    latents: Path
    text: Path
    caption: str
    start: int
    bucket: Bucket
    group: str


class CachedFiles:
    """Checks whether files of the cache are present and complete.

    The ledger answers for files it knows in their present state. Other files are opened, and the
    answer is put into the ledger.
    """

    def __init__(self, cache_dir: Path, ledger: Ledger) -> None:
        self.root, self.ledger = f"{cache_dir}/", ledger

    def has(self, path: Path) -> bool:
        """Return True if the file at `path` is complete and of the current schema."""
        try:
            now = stamp(path)
        except OSError:
            return False
        key = str(path).removeprefix(self.root)
        if self.ledger.get("whole", key) == list(now):
            return True
        try:
            if read_header(path)["schema"] != SCHEMA:
                return False
        except UNREADABLE:
            return False
        self.ledger.put("whole", key, now)
        return True


def cache_files(cache_dir: Path, *folders: str) -> Iterator[Path]:
    """Yield the files in some of `CONTENT_FOLDERS`, sorted, without temporary files."""
    for folder in folders:
        for path in sorted((cache_dir / folder).rglob("*")):
            if path.is_file() and path.suffix != ".tmp":
                yield path


def is_cache(folder: Path) -> bool:
    """Return True if `folder` holds at least one folder of a cache."""
    return any((folder / name).is_dir() for name in FOLDERS)


def short_hash(*parts: object) -> str:
    """Return the sha1 of JSON values in hexadecimal."""
    return hashlib.sha1(json.dumps(parts).encode(), usedforsecurity=False).hexdigest()
