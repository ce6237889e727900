"""What a listing's videos give: clips by bucket, and what is dropped, before anything is encoded.

A video is decoded once for this, as far as it is wanted; then the ledger knows it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .cache import Bucket, CacheSpec, Entry, short_hash
from .files import FULL
from .ledger import Ledger, stamp
from .listing import Dropped, Listing, Source
from .manifest import version
from .report import too_short
from .shots import shots

Progress = Callable[[int, int, str], None]
TOLERANCE = 1e-6  # frames: 1.2 s of 30 fps are 36 frames
CHANGED = "it was replaced meanwhile: run again"


@dataclass
class Team:
    """The processes that fill a cache together, in one file system. wait: for all of them.
    agree: whether all of them say yes; every process must ask."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = field(default=lambda: None)
    agree: Callable[[bool], bool] = field(default=lambda yes: yes)


@dataclass(frozen=True, slots=True)
class Video:
    """A source's file, the hash of its content, and what its clips are decoded from."""

    path: Path
    fingerprint: str
    decoded: Path


@dataclass
class Survey:
    """`videos`: by the source's name."""

    entries: list[Entry] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    videos: dict[str, Video] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What the ledger says of a video's content; frames at the spec's rate, `whole` if all of them
    were counted, cuts None if they were not looked for."""

    fingerprint: str
    frames: int
    whole: bool
    height: int
    width: int
    cuts: list[int] | None
    fault: str


def survey(
    listing: Listing,
    spec: CacheSpec,
    cache_dir: Path,
    ledger: Ledger,
    team: Team,
    progress: Progress,
) -> Survey:
    """Raises nothing for bad videos: they are in `dropped`, beside what the listing dropped."""
    groups = [list(group) for _, group in groupby(listing.sources, key=lambda s: str(s.path))]
    by_path = [(sources[0].path, sources) for sources in groups]
    examiner = _Examiner(spec, cache_dir, ledger)
    if team.size > 1:  # each its share; then every process finds all in the ledger
        share = by_path[team.rank :: team.size]
        for index, (path, sources) in enumerate(share):
            progress(index, len(share), "checking videos")
            examiner.know(path, _wanted(sources, spec))
        team.wait()
        ledger.reload()
        team.wait()
    found = Survey(dropped=list(listing.dropped))
    firsts: dict[str, str] = {}  # of a content: the name that it came with first
    seen: dict[tuple[str, str, int, Bucket], str] = {}
    for index, (path, sources) in enumerate(by_path):
        progress(index, len(by_path), "checking videos")
        known = examiner.know(path, _wanted(sources, spec))
        if isinstance(known, str):
            names = dict.fromkeys(source.name for source in sources)
            found.dropped += [Dropped(name, "unreadable", known) for name in names]
            continue
        decoded = examiner.decoded(path, known.fingerprint)
        video = Video(path, known.fingerprint, decoded)
        for source in sources:
            found.videos[source.name] = video
            group = firsts.setdefault(known.fingerprint, source.name)
            _add(found, source, known, group, seen, spec, cache_dir)
    progress(len(by_path), len(by_path), "checking videos")
    found.dropped.sort(key=lambda item: item.name)
    return found


def _add(
    found: Survey,
    source: Source,
    known: Known,
    group: str,
    seen: dict[tuple[str, str, int, Bucket], str],
    spec: CacheSpec,
    cache_dir: Path,
) -> None:
    """A source's clips, and what of it is dropped."""
    buckets = _fitting(spec.buckets, known)
    small = _too_small(buckets, known, spec)
    if small is not None and not (known.fault and not known.frames):
        found.dropped.append(Dropped(source.name, "too small", small))
        return
    places = list(_windows(source, known, buckets, spec))
    if known.fault:
        found.dropped.append(Dropped(source.name, "undecodable", known.fault))
    elif not places:
        found.dropped.append(_nothing_fits(source, known, buckets, spec))
    text = spec.text_path(cache_dir, source.caption)
    for start, bucket in places:
        name = f"{source.name}@{start}"
        first = seen.setdefault((known.fingerprint, source.caption, start, bucket), name)
        if first != name:
            reason = f"frame {start} on: the same pictures and caption as {first}"
            found.dropped.append(Dropped(source.name, "repeated", reason))
            continue
        latents = spec.latents_path(cache_dir, bucket, known.fingerprint, start)
        found.entries.append(
            Entry(name, source.name, latents, text, source.caption, start, bucket, group)
        )


def _fitting(buckets: Sequence[Bucket], known: Known) -> list[Bucket]:
    """Those of the aspect nearest to the video's, the longest first."""
    if not known.height or not known.width:
        return sorted(buckets, reverse=True)
    aspect = math.log(known.width / known.height)

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - aspect)

    nearest = min(buckets, key=lambda bucket: (distance(bucket), bucket.height))
    size = (nearest.height, nearest.width)
    same = [bucket for bucket in buckets if (bucket.height, bucket.width) == size]
    return sorted(same, key=lambda bucket: -bucket.frames)


def _too_small(buckets: list[Bucket], known: Known, spec: CacheSpec) -> str | None:
    bucket = buckets[0]
    if not known.height or not known.width or not spec.least_scale:
        return None
    times = bucket.enlarges(known.height, known.width)
    if times * spec.least_scale <= 1 + 1e-9:
        return None
    return (
        f"{known.height} x {known.width} pixels would be enlarged {times:.2f} times for "
        f"{bucket.height} x {bucket.width}; data.least_scale={spec.least_scale:g} allows "
        f"{1 / spec.least_scale:.2f}"
    )


def _span(source: Source, known: Known, spec: CacheSpec) -> range:
    """The frames of the video that are the source's."""
    first = math.ceil(source.start * spec.fps - TOLERANCE)
    last = known.frames
    if source.end is not None:
        last = min(last, math.floor(source.end * spec.fps + TOLERANCE))
    return range(first, max(first, last))


def _pieces(source: Source, known: Known, spec: CacheSpec) -> list[range]:
    """The source's frames from cut to cut."""
    span = _span(source, known, spec)
    if not spec.shots:
        return [span]
    cuts = known.cuts or []
    clipped = [
        range(max(s.start, span.start), min(s.stop, span.stop)) for s in shots(known.frames, cuts)
    ]
    return [piece for piece in clipped if len(piece)]


def _windows(
    source: Source, known: Known, buckets: list[Bucket], spec: CacheSpec
) -> Iterator[tuple[int, Bucket]]:
    """(first frame, bucket) of the source's clips."""
    places = []
    for piece in _pieces(source, known, spec):
        start = piece.start
        while True:
            fits = [bucket for bucket in buckets if start + bucket.frames <= piece.stop]
            if not fits:
                break
            places.append((start, fits[0]))
            start += spec.stride or fits[0].frames
    if spec.windows == "all":
        yield from places
    elif places:  # the first of the longest
        yield max(places, key=lambda place: (place[1].frames, -place[0]))


def _nothing_fits(source: Source, known: Known, buckets: list[Bucket], spec: CacheSpec) -> Dropped:
    needed, span = buckets[-1].frames, _span(source, known, spec)
    if len(span) < needed:
        return Dropped(source.name, "too short", too_short(len(span), spec.fps, needed))
    longest = max(len(piece) for piece in _pieces(source, known, spec))
    between = f"the longest of {len(_pieces(source, known, spec))} shots is"
    reason = f"{between} {too_short(longest, spec.fps, needed)}"
    return Dropped(source.name, "crosses a cut", reason)


def _wanted(sources: Sequence[Source], spec: CacheSpec) -> int | None:
    """Frames that decide about these sources; None for all of the video."""
    if spec.windows == "all" or spec.shots:
        return None
    longest = max(bucket.frames for bucket in spec.buckets)
    return max(math.ceil(source.start * spec.fps - TOLERANCE) for source in sources) + longest


class _Examiner:
    """Knows videos by the ledger, and decodes those that it does not."""

    def __init__(self, spec: CacheSpec, cache_dir: Path, ledger: Ledger) -> None:
        self.spec, self.cache_dir, self.ledger = spec, cache_dir, ledger
        self.decoder = version("av")
        self.kind = f"video {float(spec.fps):g}" + (" canonical" if spec.canonical else "")

    def know(self, path: Path, wanted: int | None) -> Known | str:
        """What is known of the video, or why it cannot be read: an error of the system is not
        remembered, for it says nothing about the content."""
        try:
            fingerprint = hashed(path, self.ledger)
            known = self._remembered(fingerprint, wanted)
            return known if known is not None else self._decode(path, fingerprint, wanted)
        except OSError as error:
            if error.errno in FULL or self._is_ours(error.filename):
                raise  # the cache's disk, not the video's
            return unreadable(error)

    def decoded(self, path: Path, fingerprint: str) -> Path:
        """What clips are decoded from."""
        if not self.spec.canonical:
            return path
        rate = short_hash(float(self.spec.fps))[:8]
        folder = self.cache_dir / "canonical" / rate / fingerprint[:2]
        return folder / f"{fingerprint}.mp4"

    def _is_ours(self, filename: object) -> bool:
        return str(filename).startswith(f"{self.cache_dir}/")

    def _remembered(self, fingerprint: str, wanted: int | None) -> Known | None:
        """A fault is believed only under the PyAV that found it: the next one may read the file."""
        value = self.ledger.get(self.kind, fingerprint)
        if value is None:
            return None
        *facts, decoder = value
        known = Known(fingerprint, *facts)
        if self.spec.shots and known.cuts is None and not known.fault:
            return None
        if self.spec.canonical and not self.decoded(Path(), fingerprint).exists():
            return None
        if wanted is not None and known.frames >= wanted:
            return known if not known.fault else Known(*_without_fault(known))
        if known.whole and (not known.fault or decoder == self.decoder):
            return known
        return None

    def _decode(self, path: Path, fingerprint: str, wanted: int | None) -> Known:
        from .decode import examine

        spec, original = self.spec, path
        fault = ""
        if spec.canonical:
            from .canonical import write_canonical

            path, wanted = self.decoded(path, fingerprint), None
            fault = write_canonical(original, path, spec.fps)
            if hashed(original, self.ledger) != fingerprint:
                path.unlink(missing_ok=True)
                raise OSError(CHANGED)
            if not path.exists():
                return self._remember(Known(fingerprint, 0, True, 0, 0, None, fault))
        facts = examine(path, spec.fps, wanted, find_cuts=spec.shots)
        if hashed(original, self.ledger) != fingerprint:
            raise OSError(CHANGED)
        fault = fault or facts.fault
        whole = bool(fault) or wanted is None or facts.frames < wanted
        cuts = facts.cuts if spec.shots else None
        size = (facts.height, facts.width)
        return self._remember(Known(fingerprint, facts.frames, whole, *size, cuts, fault))

    def _remember(self, known: Known) -> Known:
        facts = [known.frames, known.whole, known.height, known.width, known.cuts, known.fault]
        self.ledger.put(self.kind, known.fingerprint, [*facts, self.decoder])
        return known


def _without_fault(known: Known) -> tuple:
    return (known.fingerprint, known.frames, True, known.height, known.width, known.cuts, "")


def hashed(path: Path, ledger: Ledger) -> str:
    """sha1 of a file's content: read once, then known by size and times."""
    key, now = str(path if path.is_absolute() else path.absolute()), list(stamp(path))
    known = ledger.get("file", key)
    if known is not None and known[:3] == now:
        return known[3]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, _sha1).hexdigest()
    ledger.put("file", key, [*now, digest])
    return digest


def unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _sha1():  # noqa: ANN202
    return hashlib.sha1(usedforsecurity=False)
