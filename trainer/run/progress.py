"""Progress of a run: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .metrics import Row

log = logging.getLogger(__name__)

LINES = 20  # progress lines in the log of a whole run without a terminal


class StepProgress:
    """Shows loss, seconds per step, tokens per second, density and the time left."""

    def __init__(self, console: Console, start: int, steps: int, density: float) -> None:
        self._console = console
        self._start, self._steps, self._density = start, steps, density
        self._began = time.perf_counter()
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, figures="")

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, step: int, row: Row) -> None:
        """Show update `step`. row: its line of metrics."""
        figures = (
            f"loss {row['loss']:.4f}  {row['seconds_per_step']:.2f} s/step  "
            f"{row['tokens_per_second']:,.0f} tokens/s  density {self._density:.1%}"
        )
        self._bar.update(self._task, completed=step, figures=figures)
        every = max(1, (self._steps - self._start) // LINES)
        if not self._console.is_terminal and (step % every == 0 or step == self._steps):
            per_step = (time.perf_counter() - self._began) / (step - self._start)
            minutes, seconds = divmod(round(per_step * (self._steps - step)), 60)
            left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
            self._console.print(
                f"step {step}/{self._steps}  {figures}  {left} left", highlight=False
            )


class StageLog:
    """Logs a line at the end of each stage of filling the cache, and every 10 s within it."""

    def __init__(self, seconds: float = 10) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int, stage: str) -> None:
        now = time.perf_counter()
        if done == total or now - self._last > self._seconds:
            log.info(f"{stage}: {done}/{total}")
            self._last = now


def open_console(main_process: bool) -> Console:
    """Open the one console that prints, and send longreel's log there.

    Processes other than the main one log only errors.
    """
    quiet_libraries()
    console = Console(quiet=not main_process)
    if not console.is_terminal:
        console = Console(quiet=not main_process, width=120)  # files need no line breaks at 80
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    logger = logging.getLogger("longreel")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if main_process else logging.ERROR)
    return console


def quiet_libraries() -> None:
    """Silence progress bars and warnings of libraries.

    diffusers and transformers show a bar for every file they read; bitsandbytes warns about kernels
    of 4-bit layers, which longreel does not use.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
