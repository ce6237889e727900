"""Decide when a run saves, and go on when a save fails."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ...data.files import replacing
from ..adapter import lora
from ..adapter.lora import AdapterWriter
from ..config.schema import Checkpoint
from . import checkpoint
from .checkpoint import Progress, State

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # until a failed save is tried again
REQUEST = "save"  # a file of this name in the run's folder asks for a save


class Saver:
    """Writes the checkpoints of a run folder, in the main process.

    adapter: writes the adapter beside each state. wait: sleeps for a number of seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Checkpoint,
        adapter: AdapterWriter,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self.run_dir, self.config = run_dir, config
        self.folder = run_dir / "checkpoints"
        self._adapter, self._wait = adapter, wait
        self._last = time.monotonic()  # time of the last save, or of the start
        self._failed: float | None = None  # time of the last attempt, if it failed

    def due(self, step: int) -> bool:
        """Return whether to save after `step`: by its number, by the clock, or on request."""
        since = time.monotonic() - (self._last if self._failed is None else self._failed)
        if self._failed is not None:
            return since >= RETRY_SECONDS
        minutes = self.config.every_minutes
        return (
            step % self.config.every == 0
            or (minutes > 0 and since >= 60 * minutes)
            or (self.run_dir / REQUEST).exists()
        )

    def save(self, state: State, progress: Progress) -> bool:
        """Write a checkpoint and copy its adapter to the run's folder; return False if that fails.

        A failure is logged with its reason, and leaves the earlier checkpoints as they are.
        """
        try:
            folder = checkpoint.save(
                self.folder,
                state,
                progress,
                keep_last=self.config.keep_last,
                extra=self._adapter,
            )
            self.publish(folder)
            (self.run_dir / REQUEST).unlink(missing_ok=True)
        except checkpoint.NOT_SAVED as error:
            self._failed = time.monotonic()
            newest = checkpoint.latest(self.folder)
            log.error(
                f"Step {progress.step} could not be saved: {error}. Free space in "
                f"{self.run_dir}; the newest checkpoint is {newest or 'none yet'}."
            )
            return False
        self._last, self._failed = time.monotonic(), None
        return True

    def save_with_retries(self, state: State, progress: Progress) -> bool:
        """Call `save` until it succeeds, for at most `checkpoint.retry_minutes`."""
        deadline = time.monotonic() + 60 * self.config.retry_minutes
        while not self.save(state, progress):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            log.error(f"Trying again for {left / 60:.0f} minutes.")
            self._wait(min(left, RETRY_SECONDS / 6))
        return True

    def publish(self, newest: Path) -> None:
        """Copy the adapter of the newest checkpoint to the run's folder."""
        with replacing(self.run_dir / lora.WEIGHTS) as temporary:
            shutil.copyfile(newest / lora.WEIGHTS, temporary)
