"""A thread beside training that ends a run which cannot go on, and says why.

Collectives give no such answer: where one process of many is gone or stuck, the others wait in
theirs, with NCCL for as long as the process group allows. Here every process tells the others, in
the store that started the process group, that it lives and where it is; one that is silent, that
failed, or that stays in one place too long ends the run on all of them.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

FAILED = 1  # the exit code of a run that ends here


@dataclass
class Peer:
    """What is known of another process: when it was last heard, and what it then said."""

    heard: float
    beat: int = -1
    place: str = "its start"
    since: float = 0.0
    ended: str | None = None  # "": as it should; else why it failed


class Watch:
    """Of one process of a run; a context manager around all that the process does in it.

    limit: seconds that the process may spend in one place, unless that is entered as unlimited.
    beat: seconds between signs of life. gone: of silence until a process counts as dead. grace:
    that others have to fail for the same reason by themselves, once one has failed. end: what ends
    the process, given an exit code.
    """

    def __init__(
        self,
        limit: float,
        *,
        beat: float = 2.0,
        gone: float = 25.0,
        grace: float = 5.0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.limit, self.beat, self.gone, self.grace = limit, beat, gone, grace
        self._end = end
        self._place, self._since, self._limited = "the start", time.monotonic(), False
        self._stop = threading.Event()
        self._peers: dict[int, Peer] = {}
        self._store: Any = None
        self._thread: threading.Thread | None = None

    def enter(self, place: str, *, limited: bool = True) -> None:
        """From here on the process is in `place`, as `step 3: backward`."""
        self._since, self._place, self._limited = time.monotonic(), place, limited

    def __enter__(self) -> Watch:
        self.rank, size = 0, 1
        if dist.is_initialized():
            self.rank, size = dist.get_rank(), dist.get_world_size()
        if size > 1:
            # A connection of its own: PyTorch's blocks while it waits for another process.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()
            now = time.monotonic()
            self._peers = {rank: Peer(now) for rank in range(size) if rank != self.rank}
            self._tell(0)
            on_gpu = dist.get_backend() == "nccl"  # which is to be told the device
            dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
        self._thread = threading.Thread(target=self._watch, name="longreel-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        lost = _is_lost_connection(error)
        if lost and self._peers:
            cause = self._await_cause()
            self._finish("lost the others")
            where = f"process {self.rank} was in {self._place}"
            raise SystemExit(f"error: {cause or f'another process is gone: {error}'}; {where}.")
        self._finish("" if error is None else _told(error))

    # In the thread

    def _watch(self) -> None:
        number = 0
        while not self._stop.wait(self.beat):
            number += 1
            problem = self._stuck()
            try:
                self._tell(number)
                self._listen()
            except (dist.DistError, RuntimeError) as error:
                if self._stop.wait(self.beat):  # gone because all have finished
                    return
                problem = problem or f"the store that all processes talk through is gone: {error}"
            problem = problem or self._lost()
            if problem is not None and not self._stop.is_set():
                self._give_up(problem)
                return

    def _tell(self, number: int, ended: str | None = None) -> None:
        if self._store is None:
            return
        spent = time.monotonic() - self._since
        said = {"beat": number, "place": self._place, "spent": spent, "ended": ended}
        self._store.set(_key(self.rank), json.dumps(said))

    def _listen(self) -> None:
        told = self._store.multi_get([_key(rank) for rank in self._peers]) if self._peers else []
        for peer, text in zip(self._peers.values(), told, strict=True):
            said = json.loads(text)
            if said["beat"] != peer.beat or said["ended"] is not None:
                now = time.monotonic()
                peer.heard = now if peer.ended is None else peer.heard  # since when it has ended
                peer.beat, peer.place, peer.ended = said["beat"], said["place"], said["ended"]
                peer.since = now - said["spent"]

    def _lost(self) -> str | None:
        """What is wrong with another process, if that is certain by now."""
        now = time.monotonic()
        for rank, peer in self._peers.items():
            silent = now - peer.heard
            if peer.ended and silent > self.grace:
                return f"process {rank} failed in {peer.place}: {peer.ended}"
            if peer.ended is None and silent > self.gone:
                return (
                    f"process {rank} is dead or cut off: it was last heard {silent:.0f} s ago, in "
                    f"{peer.place}"
                )
        return None

    def _stuck(self) -> str | None:
        spent = time.monotonic() - self._since
        if not self._limited or spent <= self.limit:
            return None
        others = "; ".join(
            f"process {rank} in {peer.place} for {_minutes(time.monotonic() - peer.since)}"
            for rank, peer in self._peers.items()
        )
        return (
            f"process {self.rank} has been in {self._place} for {_minutes(spent)}, longer than "
            f"parallel.timeout allows{f'. The others: {others}' if others else ''}"
        )

    def _give_up(self, problem: str) -> None:
        where = "" if self._place in problem else f"; process {self.rank} was in {self._place}"
        print(f"error: {problem}{where}.", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            self._tell(-1, f"{problem}{where}")
        except (dist.DistError, RuntimeError):
            log.debug("no one was left to be told")
        self._end(FAILED)

    # At the end

    def _await_cause(self) -> str | None:
        """Why the connection to another process broke, once that is known."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._stop.clear()
        deadline = time.monotonic() + self.gone + 2 * self.beat
        number = 0
        while time.monotonic() < deadline:
            number -= 1
            try:
                self._tell(number)
                self._listen()
            except (dist.DistError, RuntimeError) as error:
                return f"the process that keeps the run's store is gone: {error}"
            if (problem := self._lost()) is not None:
                return problem
            time.sleep(min(self.beat, 1.0))
        return None

    def _finish(self, ended: str) -> None:
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        try:
            self._tell(-1, ended)
        except (dist.DistError, RuntimeError):
            log.debug("no one was left to be told")


def _key(rank: int) -> str:
    return f"longreel/watch/{rank}"


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an exception is of a collective whose other end is gone: gloo raises RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _told(error: BaseException) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
