"""The help of one command, from the schema of its options."""

from __future__ import annotations

import textwrap
from types import ModuleType

from ..trainer.config.fields import Setting, settings_of
from ..trainer.config.values import accepted, shown

WIDTH = 96


def usage(name: str, summary: str, module: ModuleType) -> str:
    """Say how a command is called, what it does, and which keys it takes."""
    lines = [module.USAGE, "", summary]
    schemas = module.OPTIONS if isinstance(module.OPTIONS, dict) else {"": module.OPTIONS}
    for part, schema in schemas.items():
        keys = [] if schema is None else list(settings_of(schema))
        if keys:
            lines += ["", f"Keys of `longreel {name}{' ' * bool(part)}{part}`:"]
        for key in keys:
            lines += ["", *describe(key)]
    if getattr(module, "TAKES_RECIPE", False):
        lines += ["", "All other keys are a recipe's: `longreel settings` explains them."]
    return "\n".join(lines)


def describe(setting: Setting) -> list[str]:
    """Give a setting's key, type, range and default in a line, and its text below it."""
    head = f"{setting.key}={shown(setting.default)}  ({accepted(setting)})"
    return [head, *(f"    {line}" for line in textwrap.wrap(setting.text, WIDTH))]
