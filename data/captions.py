"""Find captions that are longer than the model reads, and the text that is cut from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .cache import short_hash
from .ledger import Ledger

SHOWN = 60  # characters shown of a caption and of the cut text


@dataclass(frozen=True)
class CaptionLimit:
    """Says how many tokens of a caption the model reads.

    tokens: the limit. measure: caption -> (number of its tokens, text beyond the limit).
    Captions of at most `tokens` bytes are not measured, because a token has at least one byte.
    """

    tokens: int
    measure: Callable[[str], tuple[int, str]]


def cut_captions(
    captions: Iterable[str], text_key: str, ledger: Ledger, limit: CaptionLimit | None
) -> list[str]:
    """Return a line for each caption that is cut. text_key: `CacheSpec.text_key`."""
    notes = []
    for caption in captions:
        if limit is None or len(caption.encode()) <= limit.tokens:
            continue
        key = f"{text_key}/{short_hash(caption)}"
        known = ledger.get("caption", key)
        tokens, rest = limit.measure(caption) if known is None else known
        if known is None:
            ledger.put("caption", key, [tokens, rest])
        if tokens > limit.tokens:
            notes.append(
                f"caption {_shortened(caption)} has {tokens} tokens, of which the model reads "
                f"{limit.tokens}; cut: {_shortened(rest)}"
            )
    return notes


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
