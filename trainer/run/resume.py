"""Resuming: which checkpoint a run continues from, and which settings may differ then."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ...data.sampler import SeededBatches
from ..adapter import lora
from ..config.recipe import load_file, to_dict
from ..config.schema import Config
from ..config.values import ConfigError, flatten
from . import checkpoint

log = logging.getLogger(__name__)

# Seconds before each look at the newest checkpoint. Another machine may have written it, and
# network file systems answer from their cache for up to a minute.
LOOK_AFTER = (0, 5, 20, 45)

# Only these settings may differ in a resumed run: they change neither what is learned nor what
# held-out losses are measured on. `Progress.clips` tells whether the clips are the same.
FREE_KEYS = (
    "recipe",
    "run",
    "log",
    "cache",
    "checkpoint",
    "memory.recompute",
    "memory.offload",
    "memory.offload_keep",
    "memory.mlp_chunk",
    "memory.trial_step",
    "data.path",
    "data.revision",
    "data.strict",
    "parallel",
    "train.workers",
    "train.max_skips",
    "validate.every",
    "validate.prompts",
    "validate.frames",
    "validate.steps",
    "validate.guidance",
)


def check_resumable(config: Config, run_dir: Path) -> None:
    """Raise ConfigError if the folder holds a run with settings that must not change.

    FREE_KEYS may change, and `train.steps` if the learning rate is constant.
    """
    path = run_dir / "config.yaml"
    if not path.is_file() or checkpoint.latest(run_dir / "checkpoints") is None:
        return
    before, now = flatten(to_dict(load_file(path))), flatten(to_dict(config))
    free = FREE_KEYS + (("train.steps",) if config.train.schedule == "constant" else ())
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if changed:
        raise ConfigError(
            f"{run_dir} holds a run with other settings ({'; '.join(changed)}). Choose another "
            "run.dir, delete the folder, or go back to its settings to resume it."
        )


@dataclass(frozen=True)
class Position:
    """The step and the place among the clips at which a run begins or resumes.

    step: updates done before. sampler: draws the batches that follow. batches: per update and
    process. data_size: processes, where those that share clips count as one. clips: `fingerprint`
    of the training clips.
    """

    step: int
    sampler: SeededBatches
    batches: int
    data_size: int
    clips: str

    def progress(self, step: int) -> checkpoint.Progress:
        """Return the progress of the run once update `step` is done."""
        drawn = self.sampler.drawn_after((step - self.step) * self.batches)
        return checkpoint.Progress(step, self.data_size, self.clips, drawn)


def newest_everywhere(folder: Path) -> Path | None:
    """Return the newest readable checkpoint of `folder`, the same in all processes; None for none.

    All processes must call it: if they continued from different checkpoints, their weights would
    differ. Unreadable newer ones are logged. Raises ConfigError if none of the checkpoints can be
    read, or if processes keep seeing different ones.
    """
    newest = _agreed(folder)
    unreadable = checkpoint.unreadable_after(newest, folder)
    for path in unreadable:
        log.warning(f"Skipping unreadable checkpoint {path}.")
    if newest is None and unreadable:
        raise ConfigError(
            f"No checkpoint in {folder} can be read, and a new run would replace them: restore "
            "them, or delete that folder to start over."
        )
    return newest


def _agreed(folder: Path) -> Path | None:
    seen = []
    for seconds in LOOK_AFTER:
        time.sleep(seconds)
        newest = checkpoint.latest(folder)
        seen = gather_object([None if newest is None else newest.name])
        if len(set(seen)) == 1:
            return newest
    names = ", ".join(f"{name} on process {rank}" for rank, name in enumerate(seen))
    raise ConfigError(
        f"Processes see different newest checkpoints in {folder}: {names}. run.dir must be on a "
        "file system that all machines share."
    )


def check_pattern(path: Path, pattern: dict[str, Any]) -> None:
    """Raise ConfigError if the checkpoint's adapter was trained under another pattern."""
    recorded = lora.read_entry(path)["pattern"]
    if recorded != pattern:
        raise ConfigError(
            f"{path} was trained under {recorded}, and sparse.density now gives {pattern}. "
            "Set the recorded width as sparse.pattern.* in place of sparse.density, in another "
            "run.dir, or go back to the version of longreel that began the run."
        )
