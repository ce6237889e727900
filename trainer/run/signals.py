"""Signals that ask a run to stop: it finishes its step, saves, and exits with `REQUEUE`."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: a temporary failure. launch/slurm.sh requeues on it.
REQUEUE = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context in which SIGTERM and SIGUSR1 are recorded in `received` and do nothing else.

    received: the name of the first signal. Outside of the main thread, where Python allows no
    signal handlers, signals keep their effect.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
