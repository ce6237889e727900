"""Filling the cache: every clip and every caption once, however often it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING

from .ahead import ahead
from .cache import SCHEMA, Bucket, CacheSpec, Encoders, Entry, Intact
from .captions import CaptionLimit, cut_captions
from .files import digest, save_tensors, told_when_full
from .ledger import Ledger
from .listing import Dropped, Listing
from .manifest import Ready, read_ready, state, write_manifest
from .report import Report, refusal
from .survey import CHANGED, Progress, Survey, Team, Video, hashed, survey, unreadable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LEFT_OVER = "another process could not encode it; its log says why"


@dataclass(frozen=True)
class Prepared:
    """`texts` maps every caption, the extra ones too, to its file."""

    entries: list[Entry]
    texts: dict[str, Path]
    report: Report


def prepare(
    listing: Listing,
    spec: CacheSpec,
    cache_dir: str | Path,
    load_encoders: Callable[[], Encoders],
    *,
    extra_captions: Sequence[str] = (),
    strict: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Report], None] | None = None,
    caption_limit: CaptionLimit | None = None,
    team: Team | None = None,
    device: str = "",
) -> Prepared:
    """Sees to it that every clip of `listing` and every caption is in the cache; says where.

    `load_encoders` is called at most once, and only if something is missing. `extra_captions` are
    encoded beside the videos' own (validation prompts, the empty prompt). `progress` is called
    with (done, total, "checking videos" | "encoding text" | "encoding clips"), `announce` with the
    report before anything is encoded, if something is. device: what measured times are kept by.
    With a `team` of several processes each encodes its share, and all return the same.

    What cannot be used is dropped and reported; with `strict` it is a ValueError, and so is a
    listing of which nothing is left, and a disk without room. All come before an encoder is loaded:
    a video that is new to the cache is first decoded as far as it is wanted. A disk that fills up
    meanwhile is a ValueError too: what is there stays, and the same call goes on.
    """
    cache_dir = Path(cache_dir).absolute()
    with told_when_full(cache_dir):
        builder = _Builder(
            listing, spec, cache_dir, strict, team or Team(), progress or _silent, device
        )
        try:
            return builder.build(load_encoders, extra_captions, announce, caption_limit)
        finally:
            builder.close()


class _Builder:
    """One call of `prepare`."""

    def __init__(
        self,
        listing: Listing,
        spec: CacheSpec,
        cache_dir: Path,
        strict: bool,
        team: Team,
        progress: Progress,
        device: str,
    ) -> None:
        self.listing, self.spec, self.cache_dir = listing, spec, cache_dir
        self.strict, self.team, self.progress = strict, team, progress
        self.rate_key = f"{spec.video_encoder} on {device}"
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """Read when first needed: a start with a full cache does not."""
        if self._ledger is None:
            self._ledger = Ledger(self.cache_dir)
        return self._ledger

    @cached_property
    def intact(self) -> Intact:
        return Intact(self.cache_dir, self.ledger)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def build(
        self,
        load_encoders: Callable[[], Encoders],
        extra_captions: Sequence[str],
        announce: Callable[[Report], None] | None,
        caption_limit: CaptionLimit | None,
    ) -> Prepared:
        spec, team = self.spec, self.team
        before = state(self.listing)
        extra = {caption: spec.text_path(self.cache_dir, caption) for caption in extra_captions}
        ready = read_ready(self.cache_dir, self.listing, spec, [*extra.values()], before)
        if team.agree(ready is not None) and ready is not None:
            return self._as_before(ready, extra)
        found = survey(self.listing, spec, self.cache_dir, self.ledger, team, self.progress)
        self._refuse(found.entries, found.dropped)
        texts = {entry.caption: entry.text for entry in found.entries}
        texts |= extra
        notes = cut_captions(texts, spec.text_key, self.ledger, caption_limit)
        new_texts = [caption for caption, path in texts.items() if not self.intact(path)]
        new_clips = [entry for entry in found.entries if not self.intact(entry.latents)]
        if new_texts or new_clips:
            plan = self._report(found.entries, found.dropped, new_clips, notes, done=False)
            if announce is not None:
                announce(plan)
            self._check_room(plan)
            if team.rank == 0:  # `longreel cache gc` must not take what is being written for old
                wanted = Ready(found.entries, found.dropped, notes)
                write_manifest(self.cache_dir, self.listing, spec, wanted, texts, None)
        team.wait()  # all have seen the same before anything is written
        faults = self._encode(new_texts, new_clips, found, texts, load_encoders)
        dropped, entries = [*found.dropped, *faults], found.entries
        if faults or team.size > 1:
            entries = [entry for entry in entries if self.intact(entry.latents)]
            there = {entry.source for entry in entries} | {fault.name for fault in dropped}
            lost = {e.source: None for e in found.entries if e.source not in there}
            dropped += [Dropped(name, "unreadable", LEFT_OVER) for name in lost]
            self._refuse(entries, dropped)
        dropped.sort(key=lambda item: item.name)
        if team.rank == 0:
            passing = any(item.kind == "unreadable" for item in dropped)
            lasting = None if passing or faults else before
            done = Ready(entries, dropped, notes)
            write_manifest(self.cache_dir, self.listing, spec, done, texts, lasting)
            self.ledger.merge()
        return Prepared(entries, texts, self._report(entries, dropped, new_clips, notes, done=True))

    def _as_before(self, ready: Ready, extra: dict[str, Path]) -> Prepared:
        self._refuse(ready.entries, ready.dropped)
        texts = {entry.caption: entry.text for entry in ready.entries}
        texts |= extra
        report = Report(
            kept=len(ready.entries),
            sources=len({entry.source for entry in ready.entries}),
            dropped=ready.dropped,
            encoded=0,
            reused=len(ready.entries),
            buckets=_counts(self.spec.buckets, ready.entries),
            new=dict.fromkeys(self.spec.buckets, 0),
            notes=ready.notes,
        )
        return Prepared(ready.entries, texts, report)

    def _refuse(self, entries: list[Entry], dropped: list[Dropped]) -> None:
        message = refusal(self.listing.where, len(entries), dropped, self.strict)
        if message is not None:
            raise ValueError(message)

    def _report(
        self,
        entries: list[Entry],
        dropped: list[Dropped],
        new_clips: list[Entry],
        notes: list[str],
        *,
        done: bool,
    ) -> Report:
        paths = {str(entry.latents) for entry in new_clips}
        new = [entry for entry in entries if str(entry.latents) in paths]
        rate = self.ledger.get("rate", self.rate_key)  # pixels a second
        pixels = sum(entry.bucket.pixels for entry in new)
        return Report(
            kept=len(entries),
            sources=len({entry.source for entry in entries}),
            dropped=sorted(dropped, key=lambda item: item.name),
            encoded=len(new),
            reused=len(entries) - len(new),
            done=done,
            buckets=_counts(self.spec.buckets, entries),
            new=_counts(self.spec.buckets, new),
            seconds=None if rate is None else pixels / rate / self.team.size,
            notes=notes,
        )

    def _check_room(self, report: Report) -> None:
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        free = disk_usage(self.cache_dir).free
        if report.new_bytes > free:
            raise ValueError(
                f"cache.dir={self.cache_dir} needs {report.new_bytes / 1e9:.1f} GB for "
                f"{report.encoded} clips, and its disk has {free / 1e9:.1f} GB free: make room, or "
                "set cache.dir on another disk."
            )

    def _encode(
        self,
        new_texts: list[str],
        new_clips: list[Entry],
        found: Survey,
        texts: dict[str, Path],
        load_encoders: Callable[[], Encoders],
    ) -> list[Dropped]:
        """Each process its share; the first one then what is still missing, such as the clips of a
        share that was counted before another run wrote some. Returns what failed here."""
        team = self.team
        clips = _share(new_clips, team)
        encoders = _Once(load_encoders)
        self._encode_texts(new_texts[team.rank :: team.size], texts, encoders)
        faults = self._encode_clips(clips, found, encoders)
        if team.size == 1:
            return faults
        team.wait()
        if team.rank == 0:
            self.ledger.reload()
            mine = {id(entry) for entry in clips}
            rest = [entry for entry in new_clips if id(entry) not in mine]
            self._encode_texts(new_texts, texts, encoders)
            faults += self._encode_clips(rest, found, encoders)
        team.wait()
        self.ledger.reload()
        return faults

    def _encode_texts(self, captions: list[str], paths: dict[str, Path], encoders: _Once) -> None:
        # Another process may have been faster.
        missing = [caption for caption in captions if not self.intact(paths[caption])]
        for index, caption in enumerate(missing):
            self.progress(index, len(missing), "encoding text")
            text = encoders.get().text(caption)
            about = {"schema": SCHEMA, "caption": caption, "encoder": self.spec.text_encoder}
            save_tensors(paths[caption], text, about | {"sha1": digest(text)})
            self.intact(paths[caption])
        if missing:
            self.progress(len(missing), len(missing), "encoding text")

    def _encode_clips(self, entries: list[Entry], found: Survey, encoders: _Once) -> list[Dropped]:
        """Encodes, video by video in one pass each and bucket by bucket; what fails although it was
        checked is returned."""
        faults: list[Dropped] = []
        # Another process may have been faster, or an equal clip may have come before.
        missing = {e.latents: e for e in entries if not self.intact(e.latents)}
        if not missing:
            return []
        made = ahead(_read(list(missing.values()), found.videos, self.spec, self.ledger, faults))
        with closing(made):  # also when the disk is full
            self._encode_each(made, len(missing), encoders)
        self.progress(len(missing), len(missing), "encoding clips")
        return faults

    def _encode_each(
        self, made: Iterator[tuple[Entry, np.ndarray]], total: int, encoders: _Once
    ) -> None:
        done = 0
        for entry, pixels in made:
            self.progress(done, total, "encoding clips")
            done += 1
            if self.intact(entry.latents):
                continue
            began = time.perf_counter()
            latents = encoders.get().video(pixels)
            _check_latents(latents, entry.id)
            if done > 1:  # the first waits for the encoder to load
                seconds = max(time.perf_counter() - began, 1e-9)
                self.ledger.put("rate", self.rate_key, round(pixels[..., 0].size / seconds))
            save_tensors(entry.latents, {"latents": latents}, self._about(entry, latents))
            self.intact(entry.latents)

    def _about(self, entry: Entry, latents: Tensor) -> dict:
        bucket = entry.bucket
        return {
            "schema": SCHEMA,
            "encoder": self.spec.video_encoder,
            "source": entry.source,
            "start": entry.start,
            "frames": bucket.frames,
            "fps": self.spec.fps,
            "height": bucket.height,
            "width": bucket.width,
            "shape": list(latents.shape),
            "sha1": digest({"latents": latents}),
        }


class _Once:
    """Encoders, loaded when first needed."""

    def __init__(self, load: Callable[[], Encoders]) -> None:
        self._load, self._encoders = load, None

    def get(self) -> Encoders:
        if self._encoders is None:
            self._encoders = self._load()
        return self._encoders


def _silent(done: int, total: int, stage: str) -> None:
    pass


def _counts(buckets: Sequence[Bucket], entries: list[Entry]) -> dict[Bucket, int]:
    counts = dict.fromkeys(buckets, 0)
    for entry in entries:
        counts[entry.bucket] += 1
    return counts


def _share(entries: list[Entry], team: Team) -> list[Entry]:
    """The clips of this process: whole videos, the largest first to whoever has least to do."""
    by_source: dict[str, list[Entry]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, []).append(entry)

    def pixels(clips: list[Entry]) -> int:
        return sum(clip.bucket.pixels for clip in clips)

    load, mine = [0] * team.size, []
    for clips in sorted(by_source.values(), key=lambda clips: (-pixels(clips), clips[0].source)):
        least = load.index(min(load))
        load[least] += pixels(clips)
        if least == team.rank:
            mine += clips
    return sorted(mine, key=lambda entry: entry.source) if team.size > 1 else entries


def _read(
    entries: list[Entry],
    videos: dict[str, Video],
    spec: CacheSpec,
    ledger: Ledger,
    faults: list[Dropped],
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Clips with their pixels, as far as they can be read; a fault is added to `faults`."""
    from .decode import DecodeError, read_clips

    groups: dict[tuple[Path, Bucket], dict[int, Entry]] = {}
    for entry in entries:
        group = (videos[entry.source].decoded, entry.bucket)
        groups.setdefault(group, {})[entry.start] = entry
    for (path, bucket), clips in groups.items():
        size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        name = next(iter(clips.values())).source
        video = videos[name]
        try:
            for start, pixels in read_clips(path, starts=sorted(clips), fps=spec.fps, **size):
                # Else the pixels of one video would be kept as those of another.
                if path == video.path and hashed(path, ledger) != video.fingerprint:
                    raise OSError(CHANGED)
                yield clips[start], pixels
        except DecodeError as error:
            faults.append(Dropped(name, "undecodable", error.reason))
        except OSError as error:
            faults.append(Dropped(name, "unreadable", unreadable(error)))


def _check_latents(latents: Tensor, clip: str) -> None:
    if latents.ndim != 4:
        raise ValueError(f"{clip}: the encoder must return [C, f, h, w], got {list(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise ValueError(f"{clip}: the encoder returned NaN or infinity; run it in float32")
