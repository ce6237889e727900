"""Report on a data set before and after it is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .cache import Bucket
from .listing import Dropped

NAMED = 5  # items listed of each kind that was dropped, and of the notes


def too_short(frames: int, fps: float, needed: int) -> str:
    """Return the reason for dropping a video that has only `frames` frames at `fps`."""
    missing = f"{needed - frames} frames ({(needed - frames) / fps:.1f} s) missing"
    return f"{missing}: {frames / fps:.1f} s = {frames} frames at {fps:g} fps, {needed} needed"


@dataclass(frozen=True)
class Report:
    """Counts the clips of a data set, and holds what was dropped.

    kept: number of clips. sources: number of videos they come from. dropped: what is not used.
    encoded: number of new clips, which are yet to be encoded if not `done`. reused: number of clips
    found in the cache. buckets: clips per bucket, including buckets without any; new: the same of
    the new clips. seconds: estimated time of encoding; None if no clip was encoded with these
    encoders on this device before. notes: captions that are cut.
    """

    kept: int
    sources: int
    dropped: list[Dropped]
    encoded: int
    reused: int
    done: bool = True
    buckets: dict[Bucket, int] = field(default_factory=dict)
    new: dict[Bucket, int] = field(default_factory=dict)
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Return the tokens of all clips together, which one epoch reads."""
        return sum(bucket.tokens * count for bucket, count in self.buckets.items())

    @property
    def bytes(self) -> int:
        """Return the size of all latents."""
        return sum(bucket.bytes * count for bucket, count in self.buckets.items())

    @property
    def new_bytes(self) -> int:
        """Return the size of the new latents."""
        return sum(bucket.bytes * count for bucket, count in self.new.items())

    def lines(self) -> list[str]:
        """Return the report as it is printed."""
        kept = f"kept {_count(self.kept, 'clip')} of {_count(self.sources, 'video')}"
        verb = "encoded" if self.done else "to encode"
        return [
            f"{kept}: {self.encoded} {verb}, {self.reused} from the cache",
            *self._shapes(),
            *_dropped(self.dropped, NAMED),
            *_first(self.notes, NAMED),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _shapes(self) -> Iterator[str]:
        if len(self.buckets) > 1:
            for bucket, count in sorted(self.buckets.items(), reverse=True):
                yield f"  {bucket}: {_count(count, 'clip')}"
        if self.tokens:
            size = f"{self.tokens:,} tokens an epoch, {_size(self.bytes)} of latents"
            if not self.done and self.encoded:
                size += f", {_size(self.new_bytes)} of them to be written in {_time(self.seconds)}"
            yield size


def unusable(where: str, entries: int, dropped: list[Dropped], strict: bool) -> str | None:
    """Return why training cannot begin with these clips; None if it can."""
    if entries and not (strict and dropped):
        return None
    if not entries:
        first = (
            f"{where} gives no clip to train on; fix the videos or captions, or relax the settings:"
        )
    else:
        first = f"{where}: {len(dropped)} unusable; fix or remove them, or set data.strict=false:"
    return "\n".join([first, *list(_dropped(dropped, NAMED))[1:]])


def _dropped(dropped: list[Dropped], most: int) -> Iterator[str]:
    if not dropped:
        return
    kinds = Counter(item.kind for item in dropped)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    yield f"dropped {len(dropped)}: {counts}"
    width = min(48, max(len(item.name) for item in dropped))
    for kind, _ in kinds.most_common():
        lines = [f"  {i.name:<{width}}  {kind}: {i.reason}" for i in dropped if i.kind == kind]
        yield from _first(lines, most, "  ")


def _first(lines: list[str], most: int, indent: str = "") -> list[str]:
    rest = len(lines) - most
    return lines if rest <= 0 else [*lines[:most], f"{indent}and {rest} more"]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "a time that is unknown before the first clip"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
