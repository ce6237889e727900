"""Put every clip and caption of a listing into the cache, and report what is dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import disk_usage

from .cache import Bucket, CachedFiles, CacheSpec, Encoders, Entry
from .captions import CaptionLimit, cut_captions
from .encode import CacheWriter
from .files import explain_full_disk
from .ledger import Ledger
from .listing import Dropped, Listing
from .manifest import ClipList, listing_hash, read_clip_list, write_manifest
from .process_group import ProcessGroup
from .report import Report, unusable
from .survey import Progress, survey

FAILED_ELSEWHERE = "another process could not encode it; its log says why"


@dataclass(frozen=True)
class Prepared:
    """Holds the clips to train on, the file of every caption (extra ones too), and the report."""

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
    group: ProcessGroup | None = None,
    device: str = "",
) -> Prepared:
    """Encode all clips and captions of `listing` that the cache lacks; return where they are.

    load_encoders: called at most once, and only if something is missing. extra_captions: encoded in
    addition to the videos' captions, such as validation prompts and the empty prompt. progress:
    called with (done, total, "checking videos" | "encoding text" | "encoding clips"). announce:
    called with the report before anything is encoded, if something is. device: name under which
    encoding speed is remembered. group: several processes each encode a share, and all of them
    return the same.

    Videos that cannot be used are dropped and reported. Raises ValueError if nothing is left, if
    anything is dropped and `strict` is set, and if the clips do not fit on the cache's disk. All
    this happens before an encoder is loaded: a video that is new to the cache is first decoded as
    far as it is needed. A disk that fills up later is a ValueError too; files that were written
    stay, and the same call continues from there.
    """
    cache_dir = Path(cache_dir).absolute()
    with explain_full_disk(cache_dir):
        preparation = _Preparation(
            listing, spec, cache_dir, strict, group or ProcessGroup(), progress or _silent, device
        )
        try:
            return preparation.run(load_encoders, extra_captions, announce, caption_limit)
        finally:
            preparation.close()


class _Preparation:
    """Performs one call of `prepare`."""

    def __init__(
        self,
        listing: Listing,
        spec: CacheSpec,
        cache_dir: Path,
        strict: bool,
        group: ProcessGroup,
        progress: Progress,
        device: str,
    ) -> None:
        self.listing, self.spec, self.cache_dir = listing, spec, cache_dir
        self.strict, self.group, self.progress = strict, group, progress
        self.speed_key = f"{spec.video_encoder} on {device}"
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """Return the ledger, reading it at the first call: a start with a full cache never does."""
        if self._ledger is None:
            self._ledger = Ledger(self.cache_dir)
        return self._ledger

    @cached_property
    def cached(self) -> CachedFiles:
        return CachedFiles(self.cache_dir, self.ledger)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def run(
        self,
        load_encoders: Callable[[], Encoders],
        extra_captions: Sequence[str],
        announce: Callable[[Report], None] | None,
        caption_limit: CaptionLimit | None,
    ) -> Prepared:
        spec, group = self.spec, self.group
        listed = listing_hash(self.listing)
        extra = {caption: spec.text_path(self.cache_dir, caption) for caption in extra_captions}
        last = read_clip_list(self.cache_dir, self.listing, spec, [*extra.values()], listed)
        if group.all_true(last is not None) and last is not None:
            return self._from_manifest(last, extra)
        found = survey(self.listing, spec, self.cache_dir, self.ledger, group, self.progress)
        self._check_usable(found.entries, found.dropped)
        texts = {entry.caption: entry.text for entry in found.entries}
        texts |= extra
        notes = cut_captions(texts, spec.text_key, self.ledger, caption_limit)
        new_texts = [caption for caption, path in texts.items() if not self.cached.has(path)]
        new_clips = [entry for entry in found.entries if not self.cached.has(entry.latents)]
        if new_texts or new_clips:
            plan = self._report(found.entries, found.dropped, new_clips, notes, done=False)
            if announce is not None:
                announce(plan)
            self._check_room(plan)
            if group.rank == 0:  # now, so that `longreel cache gc` keeps files being written
                clip_list = ClipList(found.entries, found.dropped, notes)
                write_manifest(self.cache_dir, self.listing, spec, clip_list, texts, None)
        group.barrier()  # all processes must see the same files before any is written
        writer = CacheWriter(
            spec, self.cached, self.ledger, group, self.progress, load_encoders, self.speed_key
        )
        faults = writer.write(new_texts, new_clips, texts, found.videos)
        dropped, entries = [*found.dropped, *faults], found.entries
        if faults or group.size > 1:
            entries = [entry for entry in entries if self.cached.has(entry.latents)]
            explained = {entry.source for entry in entries} | {fault.name for fault in dropped}
            lost = {e.source: None for e in found.entries if e.source not in explained}
            dropped += [Dropped(name, "unreadable", FAILED_ELSEWHERE) for name in lost]
            self._check_usable(entries, dropped)
        dropped.sort(key=lambda item: item.name)
        if group.rank == 0:
            # A fault that may pass must be looked at again at the next start.
            may_pass = bool(faults) or any(item.kind == "unreadable" for item in dropped)
            clip_list = ClipList(entries, dropped, notes)
            state = None if may_pass else listed
            write_manifest(self.cache_dir, self.listing, spec, clip_list, texts, state)
            self.ledger.merge()
        return Prepared(entries, texts, self._report(entries, dropped, new_clips, notes, done=True))

    def _from_manifest(self, last: ClipList, extra: dict[str, Path]) -> Prepared:
        """Return the clips of the last start, all of which are still in the cache."""
        self._check_usable(last.entries, last.dropped)
        texts = {entry.caption: entry.text for entry in last.entries}
        texts |= extra
        report = Report(
            kept=len(last.entries),
            sources=len({entry.source for entry in last.entries}),
            dropped=last.dropped,
            encoded=0,
            reused=len(last.entries),
            buckets=_counts(self.spec.buckets, last.entries),
            new=dict.fromkeys(self.spec.buckets, 0),
            notes=last.notes,
        )
        return Prepared(last.entries, texts, report)

    def _check_usable(self, entries: list[Entry], dropped: list[Dropped]) -> None:
        """Raise ValueError if training cannot begin with these clips."""
        message = unusable(self.listing.where, len(entries), dropped, self.strict)
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
        speed = self.ledger.get("rate", self.speed_key)  # pixels per second
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
            seconds=None if speed is None else pixels / speed / self.group.size,
            notes=notes,
        )

    def _check_room(self, report: Report) -> None:
        """Raise ValueError if the new clips do not fit on the cache's disk."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        free = disk_usage(self.cache_dir).free
        if report.new_bytes > free:
            raise ValueError(
                f"cache.dir={self.cache_dir} needs {report.new_bytes / 1e9:.1f} GB for "
                f"{report.encoded} clips, and its disk has {free / 1e9:.1f} GB free: make room, or "
                "set cache.dir on another disk."
            )


def _silent(done: int, total: int, stage: str) -> None:
    pass


def _counts(buckets: Sequence[Bucket], entries: list[Entry]) -> dict[Bucket, int]:
    """Return the number of clips of each bucket, including buckets without any."""
    counts = dict.fromkeys(buckets, 0)
    for entry in entries:
        counts[entry.bucket] += 1
    return counts
