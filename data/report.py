"""The report on a data set, before its encoding and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .cache import Bucket
from .listing import Dropped

NAMED = 5  # of each kind of what was dropped, and of the notes


def too_short(frames: int, fps: float, needed: int) -> str:
    """The reason for dropping a video that shows only `frames` frames at `fps`."""
    missing = f"{needed - frames} frames ({(needed - frames) / fps:.1f} s) missing"
    return f"{missing}: {frames / fps:.1f} s = {frames} frames at {fps:g} fps, {needed} needed"


@dataclass(frozen=True)
class Report:
    """`kept` clips of `sources` videos, of which `encoded` are new, or to be encoded if not `done`,
    and `reused` were there.

    buckets: clips of each; the shapes that got none too. seconds: that encoding will take, None if
    no clip was encoded with these encoders and on this device before. notes: of captions.
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
        """Of all clips once."""
        return sum(bucket.tokens * count for bucket, count in self.buckets.items())

    @property
    def bytes(self) -> int:
        return sum(bucket.bytes * count for bucket, count in self.buckets.items())

    @property
    def new_bytes(self) -> int:
        return sum(bucket.bytes * count for bucket, count in self.new.items())

    def lines(self) -> list[str]:
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


def refusal(where: str, entries: int, dropped: list[Dropped], strict: bool) -> str | None:
    """Why training cannot begin with these clips; None if it can."""
    if entries and not (strict and dropped):
        return None
    if not entries:
        first = f"{where} gives no clip to train on; mend the videos or captions, or ask for less:"
    else:
        first = f"{where}: {len(dropped)} unusable; mend or remove them, or set data.strict=false:"
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
        return "a time not known before the first clip"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
