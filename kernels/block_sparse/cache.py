"""`PerTensor`: a cache of what a backend derives from the lists, for as long as the lists live."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")


class _Entry(NamedTuple, Generic[Result]):
    version: tuple[int, ...]
    others: tuple[Tensor | None, ...]  # the inputs besides the key
    result: Result


class PerTensor(Generic[Result]):
    """Caches `make(key, *others, *settings)`: one result per `key` tensor, dropped with it.

    A result is reused only for the same tensor objects and settings, and only while none of the
    tensors has been changed in place.
    """

    def __init__(self, make: Callable[..., Result]) -> None:
        self.make = make
        self.entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(
        self, key: Tensor, *others: Tensor | None, settings: tuple[int, ...] = ()
    ) -> Result:
        version = (*settings, *(_version(x) for x in (key, *others)))
        entry = self.entries.get(key)
        if (
            entry is None
            or entry.version != version
            or any(a is not b for a, b in zip(entry.others, others, strict=True))
        ):
            result = self.make(key, *others, *settings)
            entry = self.entries[key] = _Entry(version, others, result)
        return entry.result


def _version(x: Tensor | None) -> int:
    """Return the count of in-place changes; 0 for inference tensors, which keep none."""
    return 0 if x is None or x.is_inference() else x._version
