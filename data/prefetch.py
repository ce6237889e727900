"""Compute the next item of an iterator in a thread while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same items in the same order, computed by a thread.

    At most two items exist at a time: the one in use and the next. An error of `items` is raised in
    place of its item. If the consumer stops early, the thread stops too.
    """
    made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    room = threading.Semaphore(2)
    stopped = threading.Event()

    def make() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                try:
                    item = next(items)
                except StopIteration:
                    break
                made.put(("item", item))
                del item
            made.put(("end", None))
        except BaseException as error:  # re-raised in the consumer
            made.put(("error", error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            del value
            room.release()
    finally:
        stopped.set()
        room.release()
        thread.join()
