"""When a run saves, and how a save that fails loses nothing."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ...data.files import replacing
from ..adapter import lora
from ..config.schema import Checkpoint
from . import checkpoint
from .checkpoint import Progress, State

log = logging.getLogger(__name__)

AGAIN = 60.0  # seconds until a save that failed is tried again
REQUEST = "save"  # the file in the run's folder that asks for one


class Saver:
    """The checkpoints of a run folder; of the main process.

    adapter: writes the adapter of a state into a folder. wait: sleeps for some seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Checkpoint,
        adapter: Callable[[Path, State], object],
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self.run_dir, self.config = run_dir, config
        self.folder = run_dir / "checkpoints"
        self._adapter, self._wait = adapter, wait
        self._last = time.monotonic()  # a save, or the start
        self._failed: float | None = None  # when the newest one did, if it did

    def due(self, step: int) -> bool:
        """Whether to save after `step`: by its number, the clock, or because someone asks."""
        since = time.monotonic() - (self._last if self._failed is None else self._failed)
        if self._failed is not None:
            return since >= AGAIN
        minutes = self.config.every_minutes
        return (
            step % self.config.every == 0
            or (minutes > 0 and since >= 60 * minutes)
            or (self.run_dir / REQUEST).exists()
        )

    def save(self, state: State, progress: Progress) -> bool:
        """Whether the checkpoint, and its adapter in the run's folder, are written. If not, why is
        logged, and the checkpoints before it stay."""
        try:
            folder = checkpoint.save(
                self.folder,
                state,
                progress,
                keep_last=self.config.keep_last,
                extra=lambda folder: self._adapter(folder, state),
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

    def insist(self, state: State, progress: Progress) -> bool:
        """`save`, again and again for `retry_minutes`, while the state waits in memory."""
        deadline = time.monotonic() + 60 * self.config.retry_minutes
        while not self.save(state, progress):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            log.error(f"It is tried again for {left / 60:.0f} minutes.")
            self._wait(min(left, AGAIN / 6))
        return True

    def publish(self, newest: Path) -> None:
        """The run folder holds the adapter of its newest checkpoint."""
        with replacing(self.run_dir / lora.WEIGHTS) as temporary:
            shutil.copyfile(newest / lora.WEIGHTS, temporary)
