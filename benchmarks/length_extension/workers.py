"""Processes that draw and measure clips; nothing heavy is imported in them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from longreel.data.coherence import measure

FEW = 48  # items below which processes cost more than they save
MOST = 16

T, R = TypeVar("T"), TypeVar("R")


class Workers:
    """Keeps a pool of one process per processor, at most MOST, started when first needed.

    Processes are spawned, because a process that has used a GPU must not be forked.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = min(count or os.cpu_count() or 1, MOST)
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return `[function(item) for item in items]`; both must pickle."""
        if len(items) < FEW or self.count == 1:
            return [function(item) for item in items]
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context)
        size = -(-len(items) // (4 * self.count))
        return list(self._pool.map(function, items, chunksize=size))

    def measure(self, name: str, clips: np.ndarray, native: int) -> list[dict[str, float]]:
        """Return `coherence.measure` of each clip."""
        return self.map(partial(_measure, name, native), list(clips))


def _measure(name: str, native: int, clip: np.ndarray) -> dict[str, float]:
    return measure(name, clip, native)
