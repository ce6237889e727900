"""The settings as documents show them: docs/settings.md and `longreel settings`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from ...sparse.patterns import PATTERNS
from .fields import Setting, settings_of
from .renamed import KEYS
from .schema import Config
from .values import accepted, shown

HEAD = """\
# Settings

Every key of a recipe and of the command line, `recipe=NAME key.path=value ...`. This page is
written by `python -m longreel.trainer.config.reference > docs/settings.md`; `longreel settings
WORD` prints the same for the keys that match a word, and `longreel config recipe=NAME` the values
that a run would have.

Values are typed as they stand, without quotes: all that follows the first `=` is the value. A list
is written `[a, b]`; `null` unsets a setting that takes it. Numbers out of their range, unknown keys
and settings that exclude each other end a command with one message, before anything loads.
"""
TABLE = "| key | default | values | |\n|---|---|---|---|"


def documented_settings() -> Iterator[Setting]:
    """Yield the settings as they are typed: a pattern by its name."""
    for setting in settings_of(Config):
        if setting.key != "sparse.pattern":
            yield setting
            continue
        names = Literal[tuple(PATTERNS)]  # pyright: ignore[reportInvalidTypeForm]
        yield dataclasses.replace(setting, key="sparse.pattern.name", hint=names, default="radial")


def page() -> str:
    """Return docs/settings.md."""
    sections = {"": ("General", Config.__doc__)}
    for item in dataclasses.fields(Config):
        if item.default_factory is not dataclasses.MISSING:
            sections[item.name] = (f"`{item.name}`", item.default_factory.__doc__)
    lines = [HEAD]
    settings = list(documented_settings())
    for name, (title, about) in sections.items():
        rows = [_row(setting) for setting in settings if _section(setting.key) == name]
        lines += [f"## {title}", "", str(about), "", TABLE, *rows, ""]
    lines += [
        "## Renamed keys",
        "",
        "The old names still work, with a line that names the new one.",
    ]
    lines += ["", "| old | new |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in KEYS.items()]
    return "\n".join(lines) + "\n"


def _section(key: str) -> str:
    return key.partition(".")[0] if "." in key else ""


def _row(setting: Setting) -> str:
    values = accepted(setting).removeprefix("one of ")
    default = shown(setting.default)
    cells = (f"`{setting.key}`", f"`{default}`" if default else "", values, setting.text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
