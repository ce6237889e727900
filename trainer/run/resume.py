"""Whether a command goes on with the run that its folder holds."""

from __future__ import annotations

from pathlib import Path

from ..config.recipe import load_file, to_dict
from ..config.schema import Config
from ..config.values import ConfigError, flatten
from . import checkpoint

# A resumed run may differ from the one that it continues in these alone: they do not change what
# is learnt, or what held-out losses are compared with. The clips are compared by themselves.
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
    """A run folder belongs to one config, but for FREE_KEYS and, at a constant rate, its steps."""
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
