"""Find the clips that a listing's videos give, and what is dropped, before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .cache import Bucket, CacheSpec, Entry
from .ledger import Ledger
from .listing import Dropped, Listing, Source
from .process_group import ProcessGroup
from .records import VideoRecord, VideoRecords
from .report import too_short
from .shots import shots

Progress = Callable[[int, int, str], None]
TOLERANCE = 1e-6  # frames; 1.2 s at 30 fps are 36 frames in spite of rounding


@dataclass(frozen=True, slots=True)
class Video:
    """Holds a source's file, the sha1 of its content, and the file its clips are decoded from."""

    path: Path
    fingerprint: str
    decoded: Path


@dataclass
class Survey:
    """Holds the clips found, what was dropped, and the videos by their source's name."""

    entries: list[Entry] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    videos: dict[str, Video] = field(default_factory=dict)


def survey(
    listing: Listing,
    spec: CacheSpec,
    cache_dir: Path,
    ledger: Ledger,
    group: ProcessGroup,
    progress: Progress,
) -> Survey:
    """Choose the clips of all videos, decoding those that are new to the ledger.

    Bad videos raise nothing: they are in `dropped`, beside those that the listing dropped.
    """
    by_file = [list(sources) for _, sources in groupby(listing.sources, key=lambda s: str(s.path))]
    by_path = [(sources[0].path, sources) for sources in by_file]
    records = VideoRecords(spec, cache_dir, ledger)
    if group.size > 1:  # decode a share each; then every process finds all videos in the ledger
        share = by_path[group.rank :: group.size]
        for index, (path, sources) in enumerate(share):
            progress(index, len(share), "checking videos")
            records.get(path, _frames_needed(sources, spec))
        group.barrier()
        ledger.reload()
        group.barrier()
    found = Survey(dropped=list(listing.dropped))
    first_names: dict[str, str] = {}  # content -> name of the first video with it
    seen: dict[tuple[str, str, int, Bucket], str] = {}
    for index, (path, sources) in enumerate(by_path):
        progress(index, len(by_path), "checking videos")
        record = records.get(path, _frames_needed(sources, spec))
        if isinstance(record, str):
            names = dict.fromkeys(source.name for source in sources)
            found.dropped += [Dropped(name, "unreadable", record) for name in names]
            continue
        decoded = records.decoded_file(path, record.fingerprint)
        video = Video(path, record.fingerprint, decoded)
        for source in sources:
            found.videos[source.name] = video
            first_name = first_names.setdefault(record.fingerprint, source.name)
            _add(found, source, record, first_name, seen, spec, cache_dir)
    progress(len(by_path), len(by_path), "checking videos")
    found.dropped.sort(key=lambda item: item.name)
    return found


def _add(
    found: Survey,
    source: Source,
    record: VideoRecord,
    first_name: str,
    seen: dict[tuple[str, str, int, Bucket], str],
    spec: CacheSpec,
    cache_dir: Path,
) -> None:
    """Add a source's clips to `found`, and the reason for what is dropped of it.

    seen: names of the clips so far, by content, caption, first frame and bucket.
    """
    buckets = _nearest_aspect(spec.buckets, record)
    small = _too_small(buckets, record, spec)
    if small is not None and not (record.fault and not record.frames):
        found.dropped.append(Dropped(source.name, "too small", small))
        return
    windows = list(_windows(source, record, buckets, spec))
    if record.fault:
        found.dropped.append(Dropped(source.name, "undecodable", record.fault))
    elif not windows:
        found.dropped.append(_nothing_fits(source, record, buckets, spec))
    text = spec.text_path(cache_dir, source.caption)
    for start, bucket in windows:
        name = f"{source.name}@{start}"
        first = seen.setdefault((record.fingerprint, source.caption, start, bucket), name)
        if first != name:
            reason = f"from frame {start} on: the same pictures and caption as {first}"
            found.dropped.append(Dropped(source.name, "repeated", reason))
            continue
        latents = spec.latents_path(cache_dir, bucket, record.fingerprint, start)
        found.entries.append(
            Entry(name, source.name, latents, text, source.caption, start, bucket, first_name)
        )


def _nearest_aspect(buckets: Sequence[Bucket], record: VideoRecord) -> list[Bucket]:
    """Return the buckets of the aspect nearest to the video's, the longest first."""
    if not record.height or not record.width:
        return sorted(buckets, reverse=True)
    aspect = math.log(record.width / record.height)

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - aspect)

    nearest = min(buckets, key=lambda bucket: (distance(bucket), bucket.height))
    size = (nearest.height, nearest.width)
    same = [bucket for bucket in buckets if (bucket.height, bucket.width) == size]
    return sorted(same, key=lambda bucket: -bucket.frames)


def _too_small(buckets: list[Bucket], record: VideoRecord, spec: CacheSpec) -> str | None:
    """Return the reason if the video is smaller than `least_scale` allows, else None."""
    bucket = buckets[0]
    if not record.height or not record.width or not spec.least_scale:
        return None
    times = bucket.enlarges(record.height, record.width)
    if times * spec.least_scale <= 1 + 1e-9:
        return None
    return (
        f"{record.height} x {record.width} pixels would be enlarged {times:.2f} times for "
        f"{bucket.height} x {bucket.width}; data.least_scale={spec.least_scale:g} allows "
        f"{1 / spec.least_scale:.2f}"
    )


def _span(source: Source, record: VideoRecord, spec: CacheSpec) -> range:
    """Return the frames of the video that belong to the source."""
    first = math.ceil(source.start * spec.fps - TOLERANCE)
    last = record.frames
    if source.end is not None:
        last = min(last, math.floor(source.end * spec.fps + TOLERANCE))
    return range(first, max(first, last))


def _pieces(source: Source, record: VideoRecord, spec: CacheSpec) -> list[range]:
    """Return the source's frames, split at cuts if clips must not cross them."""
    span = _span(source, record, spec)
    if not spec.shots:
        return [span]
    cuts = record.cuts or []
    clipped = [
        range(max(s.start, span.start), min(s.stop, span.stop)) for s in shots(record.frames, cuts)
    ]
    return [piece for piece in clipped if len(piece)]


def _windows(
    source: Source, record: VideoRecord, buckets: list[Bucket], spec: CacheSpec
) -> Iterator[tuple[int, Bucket]]:
    """Yield (first frame, bucket) of the source's clips."""
    windows = []
    for piece in _pieces(source, record, spec):
        start = piece.start
        while True:
            fits = [bucket for bucket in buckets if start + bucket.frames <= piece.stop]
            if not fits:
                break
            windows.append((start, fits[0]))
            start += spec.stride or fits[0].frames
    if spec.windows == "all":
        yield from windows
    elif windows:  # the first of the longest
        yield max(windows, key=lambda window: (window[1].frames, -window[0]))


def _nothing_fits(
    source: Source, record: VideoRecord, buckets: list[Bucket], spec: CacheSpec
) -> Dropped:
    """Return why no clip of the source fits any bucket: it is too short, or its shots are."""
    needed, span = buckets[-1].frames, _span(source, record, spec)
    if len(span) < needed:
        return Dropped(source.name, "too short", too_short(len(span), spec.fps, needed))
    pieces = _pieces(source, record, spec)
    longest = max(len(piece) for piece in pieces)
    between = f"the longest of {len(pieces)} shots is"
    reason = f"{between} {too_short(longest, spec.fps, needed)}"
    return Dropped(source.name, "crosses a cut", reason)


def _frames_needed(sources: Sequence[Source], spec: CacheSpec) -> int | None:
    """Return how many frames of a video decide its clips; None for all frames."""
    if spec.windows == "all" or spec.shots:
        return None
    longest = max(bucket.frames for bucket in spec.buckets)
    return max(math.ceil(source.start * spec.fps - TOLERANCE) for source in sources) + longest
