"""Renamed keys and values: recipes, commands and saved runs may go on using the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .values import ConfigError, shown

KEYS = {
    "memory.checkpoint": "memory.recompute",
    "memory.fused_modulation": "speed.fused_modulation",
    "memory.fused_norms": "speed.fused_norms",
    "memory.optimizer": "train.optimizer",
    "memory.probe": "memory.trial_step",
    "train.accumulate": "train.gradient_accumulation",
    "train.clip": "train.max_grad_norm",
    "validate.clips": "validate.videos",
}
# Of the new key: the value that each old one means today.
VALUES = {
    "memory.recompute": {
        "attention": "all_but_attention",
        "full": "all",
        "true": "all",  # memory.checkpoint was once a flag
        "false": "none",
    },
}


def with_new_names(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings by their keys of today, and a line for each that was renamed.

    Raises ConfigError if a setting is given under both names.
    """
    renamed: dict[str, Any] = {}
    lines = []
    for key, value in given.items():
        new = KEYS.get(key, key)
        if new in renamed or (new != key and new in given):
            raise ConfigError(f"{key} is the old name of {new}, which is given too: leave one out.")
        meaning = VALUES.get(new, {}).get(str(value).lower(), value)
        renamed[new] = meaning
        if (new, meaning) != (key, value):
            lines.append(f"{key}={shown(value)} is now {new}={shown(meaning)}.")
    return renamed, lines
