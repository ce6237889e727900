"""The cache of latents and text embeddings: names, keys and what is in it.

    <cache>/latents/<video key>/<aa>/<sha1>.safetensors    one clip
    <cache>/text/<text key>/<aa>/<sha1>.safetensors        one caption
    <cache>/ledger/                                        what is known of files (ledger.py)
    <cache>/manifests/<key>.jsonl                          which files a run uses (manifest.py)

A key is the hash of everything that shaped the tensors, so a changed setting never meets a stale
file. Every file appears whole, by a rename: a build that was killed goes on where it stopped, and
several processes may build at once. A complete cache is used without PyAV and without encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .files import UNREADABLE, read_about
from .ledger import Ledger, stamp

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCHEMA = 2  # raise it with any change of what the tensors or the files hold


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that clips are brought to: `frames` of `height` x `width` pixels.

    tokens, bytes: of one clip in the transformer and in the cache, for the report.
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
        return self.frames * self.height * self.width

    def enlarges(self, height: int, width: int) -> float:
        """How many times a picture has to grow to cover the bucket."""
        return max(self.height / height, self.width / width)


@dataclass(frozen=True)
class CacheSpec:
    """What the clips are, and which encoders see them.

    buckets: the shapes; a video gets the one nearest to its aspect, and the longest that fits.
    windows: "first" takes the first clip of each video; "all" one every `stride` frames (0: no
    overlap) as long as it is whole. least_scale: smallest share of the bucket's height and width
    that a video must have. shots: no clip crosses a cut. canonical: decode a copy of constant frame
    rate, made once. The encoders' names must change with anything that changes their output.
    """

    buckets: tuple[Bucket, ...]
    fps: float
    video_encoder: str
    text_encoder: str
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
        """How clips are chosen is left out: a clip is the same wherever its neighbours begin."""
        return self._video_keys[bucket]

    @cached_property
    def _video_keys(self) -> dict[Bucket, str]:
        copied = ("canonical",) if self.canonical else ()
        rest = (float(self.fps), self.video_encoder, *copied)
        return {
            bucket: short_hash(SCHEMA, bucket.frames, bucket.height, bucket.width, *rest)[:16]
            for bucket in self.buckets
        }

    @cached_property
    def text_key(self) -> str:
        return short_hash(SCHEMA, self.text_encoder)[:16]

    def latents_path(self, cache_dir: Path, bucket: Bucket, fingerprint: str, start: int) -> Path:
        name = short_hash(fingerprint, start)
        folder = f"{cache_dir}/latents/{self.video_key(bucket)}"  # joining Paths takes longer
        return Path(f"{folder}/{name[:2]}/{name}.safetensors")

    def text_path(self, cache_dir: Path, caption: str) -> Path:
        name = short_hash(caption)
        return Path(f"{cache_dir}/text/{self.text_key}/{name[:2]}/{name}.safetensors")


@dataclass
class Encoders:
    """`video`: uint8 RGB [F, H, W, 3] -> [C, f, h, w]. `text`: caption -> named tensors.

    Tensors are stored in the dtype they come in. All captions are encoded before the first clip,
    so a text encoder may be loaded at its first call and freed at the first call of `video`.
    """

    video: Callable[[np.ndarray], Tensor]
    text: Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached clip: frames `start` ... of the video `source`, and its caption's embedding.

    group: the first name of the video's content, which copies of it share.
    """

    id: str
    source: str
    latents: Path
    text: Path
    caption: str
    start: int
    bucket: Bucket
    group: str


class Intact:
    """Whether files of the cache are whole: by the ledger if it knows the file as it is now, else
    by its header, which then is remembered."""

    def __init__(self, cache_dir: Path, ledger: Ledger) -> None:
        self.root, self.ledger = f"{cache_dir}/", ledger

    def __call__(self, path: Path) -> bool:
        try:
            now = stamp(path)
        except OSError:
            return False
        key = str(path).removeprefix(self.root)
        if self.ledger.get("whole", key) == list(now):
            return True
        try:
            if read_about(path)["schema"] != SCHEMA:
                return False
        except UNREADABLE:
            return False
        self.ledger.put("whole", key, now)
        return True


def short_hash(*parts: object) -> str:
    return hashlib.sha1(json.dumps(parts).encode(), usedforsecurity=False).hexdigest()
