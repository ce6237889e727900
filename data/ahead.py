"""One item ahead: what comes next is made while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items in the same order, made by a thread.

    At most two exist at a time: the one in use and the next. An error of `items` is raised where
    its item would have come; a consumer that stops early stops the thread.
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
        except BaseException as error:  # noqa: BLE001 - goes on to the consumer
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
