"""What a backend makes of the lists once, kept for as long as the lists live."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class _Entry(NamedTuple, Generic[Made]):
    version: tuple[int, ...]
    others: tuple[Tensor | None, ...]  # the tensors besides the key that it was made from
    made: Made


class PerTensor(Generic[Made]):
    """`make(key, *others, *settings)`, one result a `key` tensor, dropped with it.

    A result serves only the very tensors and settings it was made from, unchanged since.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self.make = make
        self.entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, key: Tensor, *others: Tensor | None, settings: tuple[int, ...] = ()) -> Made:
        version = (*settings, *(_version(x) for x in (key, *others)))
        entry = self.entries.get(key)
        if (
            entry is None
            or entry.version != version
            or any(a is not b for a, b in zip(entry.others, others, strict=True))
        ):
            made = self.make(key, *others, *settings)
            entry = self.entries[key] = _Entry(version, others, made)
        return entry.made


def _version(x: Tensor | None) -> int:
    """Counts in-place changes; inference tensors keep no count (and rarely change)."""
    return 0 if x is None or x.is_inference() else x._version
