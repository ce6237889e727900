"""A thread beside training that ends a run which cannot continue, and says why.

Collectives do not report that another process is gone or stuck: they wait, with NCCL for as long as
the process group's timeout. So every process publishes, in the store that started the process
group, that it is alive and what it is doing. A process that is silent, has failed or stays in one
place for too long ends the run on all processes.
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
    """The last sign of life of another process: when it came, and what it said.

    ended: None while the process runs; "" once it ended well, else the reason of its failure.
    """

    heard: float
    beat: int = -1
    place: str = "its start"
    since: float = 0.0
    ended: str | None = None


class Watch:
    """Per-process watchdog. Use it as a context manager around the whole run.

    limit: seconds that the process may spend in one place, unless that place is unlimited.
    beat: seconds between signs of life. gone: seconds of silence after which a process counts as
    dead. grace: seconds in which other processes may fail by themselves, with a message of their
    own, after one has failed. end: ends the process with an exit code.
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
        self.rank = 0
        self._stop = threading.Event()
        self._peers: dict[int, Peer] = {}
        self._store: Any = None
        self._thread: threading.Thread | None = None

    def enter(self, place: str, *, limited: bool = True) -> None:
        """Record that the process is now in `place`, such as `step 3: backward`."""
        self._since, self._place, self._limited = time.monotonic(), place, limited

    def __enter__(self) -> Watch:
        size = 1
        if dist.is_initialized():
            self.rank, size = dist.get_rank(), dist.get_world_size()
        if size > 1:
            # A separate connection, because PyTorch's blocks while it waits for another process.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()
            now = time.monotonic()
            self._peers = {rank: Peer(now) for rank in range(size) if rank != self.rank}
            self._tell(0)
            on_gpu = dist.get_backend() == "nccl"  # whose barrier needs the device
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
        self._finish("" if error is None else _reason(error))

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
        keys = [_key(rank) for rank in self._peers]
        texts = self._store.multi_get(keys) if keys else []
        for peer, text in zip(self._peers.values(), texts, strict=True):
            said = json.loads(text)
            if said["beat"] != peer.beat or said["ended"] is not None:
                now = time.monotonic()
                peer.heard = now if peer.ended is None else peer.heard  # the time of its end
                peer.beat, peer.place, peer.ended = said["beat"], said["place"], said["ended"]
                peer.since = now - said["spent"]

    def _lost(self) -> str | None:
        """Return what is wrong with another process, if that is certain by now."""
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
            log.debug("no other process is left to notify")
        self._end(FAILED)

    # At the end

    def _await_cause(self) -> str | None:
        """Wait for, and return, the reason why the connection to another process broke."""
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
            log.debug("no other process is left to notify")


def _key(rank: int) -> str:
    return f"longreel/watch/{rank}"


def _is_lost_connection(error: BaseException | None) -> bool:
    """Return whether a collective lost its other end, for which gloo raises RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _reason(error: BaseException) -> str:
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
