"""Encode the captions and clips that the cache lacks, sharing the work among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import SCHEMA, Bucket, CachedFiles, CacheSpec, Encoders, Entry
from .files import digest, save_tensors
from .identity import header_value
from .ledger import Ledger
from .listing import Dropped
from .prefetch import prefetch
from .process_group import ProcessGroup
from .records import REPLACED, content_hash, read_error
from .survey import Progress, Video

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class CacheWriter:
    """Writes missing captions and clips to the cache.

    load_encoders: called when an encoder is first needed, at most once. speed_key: where the ledger
    keeps the measured speed of encoding, in pixels per second.
    """

    def __init__(
        self,
        spec: CacheSpec,
        cached: CachedFiles,
        ledger: Ledger,
        group: ProcessGroup,
        progress: Progress,
        load_encoders: Callable[[], Encoders],
        speed_key: str,
    ) -> None:
        self.spec, self.cached, self.ledger = spec, cached, ledger
        self.group, self.progress, self.speed_key = group, progress, speed_key
        self._load_encoders = load_encoders
        self._encoders: Encoders | None = None

    def write(
        self,
        captions: list[str],
        entries: list[Entry],
        texts: dict[str, Path],
        videos: dict[str, Video],
    ) -> list[Dropped]:
        """Encode `captions` and the clips of `entries`; return the videos that failed here.

        Each process encodes its share. The first process then encodes what is still missing, such
        as clips of a share that was counted before another run wrote some of them.
        texts: file of each caption. videos: by the source's name.
        """
        group = self.group
        share = _share(entries, group)
        self._write_texts(captions[group.rank :: group.size], texts)
        faults = self._write_clips(share, videos)
        if group.size == 1:
            return faults
        group.barrier()
        if group.rank == 0:
            self.ledger.reload()
            mine = {id(entry) for entry in share}
            rest = [entry for entry in entries if id(entry) not in mine]
            self._write_texts(captions, texts)
            faults += self._write_clips(rest, videos)
        group.barrier()
        self.ledger.reload()
        return faults

    @property
    def encoders(self) -> Encoders:
        """Return the encoders, loading them if this is the first call."""
        if self._encoders is None:
            self._encoders = self._load_encoders()
        return self._encoders

    def _write_texts(self, captions: list[str], paths: dict[str, Path]) -> None:
        # Another process may have written some of them meanwhile.
        missing = [caption for caption in captions if not self.cached.has(paths[caption])]
        for index, caption in enumerate(missing):
            self.progress(index, len(missing), "encoding text")
            text = self.encoders.text(caption)
            encoder = header_value(self.spec.text_encoder)
            header = {"schema": SCHEMA, "caption": caption, "encoder": encoder}
            save_tensors(paths[caption], text, header | {"sha1": digest(text)})
            self.cached.has(paths[caption])  # enters it into the ledger
        if missing:
            self.progress(len(missing), len(missing), "encoding text")

    def _write_clips(self, entries: list[Entry], videos: dict[str, Video]) -> list[Dropped]:
        """Encode clips, decoding each video once per bucket; return what can no longer be read."""
        faults: list[Dropped] = []
        # Another process may have written some of them meanwhile, and equal clips share a file.
        missing = {e.latents: e for e in entries if not self.cached.has(e.latents)}
        if not missing:
            return []
        clips = prefetch(_read(list(missing.values()), videos, self.spec, self.ledger, faults))
        with closing(clips):  # stops its thread even if the disk is full
            self._write_each(clips, len(missing))
        self.progress(len(missing), len(missing), "encoding clips")
        return faults

    def _write_each(self, clips: Iterator[tuple[Entry, np.ndarray]], total: int) -> None:
        done = 0
        for entry, pixels in clips:
            self.progress(done, total, "encoding clips")
            done += 1
            if self.cached.has(entry.latents):
                continue
            began = time.perf_counter()
            latents = self.encoders.video(pixels)
            _check_latents(latents, entry.id)
            if done > 1:  # the first clip's time includes loading the encoder
                seconds = max(time.perf_counter() - began, 1e-9)
                self.ledger.put("rate", self.speed_key, round(pixels[..., 0].size / seconds))
            save_tensors(entry.latents, {"latents": latents}, self._header(entry, latents))
            self.cached.has(entry.latents)  # enters it into the ledger

    def _header(self, entry: Entry, latents: Tensor) -> dict:
        bucket = entry.bucket
        return {
            "schema": SCHEMA,
            "encoder": header_value(self.spec.video_encoder),
            "source": entry.source,
            "start": entry.start,
            "frames": bucket.frames,
            "fps": self.spec.fps,
            "height": bucket.height,
            "width": bucket.width,
            "shape": list(latents.shape),
            "sha1": digest({"latents": latents}),
        }


def _share(entries: list[Entry], group: ProcessGroup) -> list[Entry]:
    """Return this process's clips: whole videos, the largest first to the least loaded process."""
    by_source: dict[str, list[Entry]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, []).append(entry)

    def pixels(clips: list[Entry]) -> int:
        return sum(clip.bucket.pixels for clip in clips)

    load, mine = [0] * group.size, []
    for clips in sorted(by_source.values(), key=lambda clips: (-pixels(clips), clips[0].source)):
        least = load.index(min(load))
        load[least] += pixels(clips)
        if least == group.rank:
            mine += clips
    return sorted(mine, key=lambda entry: entry.source) if group.size > 1 else entries


def _read(
    entries: list[Entry],
    videos: dict[str, Video],
    spec: CacheSpec,
    ledger: Ledger,
    faults: list[Dropped],
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Yield clips with their pixels; what cannot be read is added to `faults`."""
    from .decode import DecodeError, read_clips

    groups: dict[tuple[Path, Bucket], dict[int, Entry]] = {}
    for entry in entries:
        key = (videos[entry.source].decoded, entry.bucket)
        groups.setdefault(key, {})[entry.start] = entry
    for (path, bucket), clips in groups.items():
        size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        name = next(iter(clips.values())).source
        video = videos[name]
        try:
            for start, pixels in read_clips(path, starts=sorted(clips), fps=spec.fps, **size):
                # Otherwise the pixels of one video would be stored under another's name.
                if path == video.path and content_hash(path, ledger) != video.fingerprint:
                    raise OSError(REPLACED)
                yield clips[start], pixels
        except DecodeError as error:
            faults.append(Dropped(name, "undecodable", error.reason))
        except OSError as error:
            faults.append(Dropped(name, "unreadable", read_error(error)))


def _check_latents(latents: Tensor, clip: str) -> None:
    """Raise ValueError for latents of a wrong shape or with NaN or infinity."""
    if latents.ndim != 4:
        raise ValueError(f"{clip}: the encoder must return [C, f, h, w], got {list(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise ValueError(f"{clip}: the encoder returned NaN or infinity; run it in float32")
