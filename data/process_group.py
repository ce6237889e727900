"""Describe the processes that fill a cache together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class ProcessGroup:
    """Describes the processes that share the work on one cache, in one file system.

    rank, size: this process and their number. barrier: waits for all processes. all_true: returns
    True if every process passed True; all of them must call it.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = field(default=lambda: None)
    all_true: Callable[[bool], bool] = field(default=lambda value: value)
