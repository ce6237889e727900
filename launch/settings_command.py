"""`longreel settings`: what the settings of recipes mean."""

from __future__ import annotations

USAGE = "longreel settings [WORD]"
OPTIONS = None


def settings(argv: list[str]) -> None:
    """Print the settings whose key or text holds the word, all of them without one."""
    from ..trainer.config.reference import documented_settings
    from ..trainer.config.renamed import KEYS
    from ..trainer.config.values import ConfigError, did_you_mean
    from .usage import describe

    if len(argv) > 1:
        raise ConfigError(f"settings takes one word, not {len(argv)}: {' '.join(argv)}.")
    word = argv[0].partition("=")[0].lower() if argv else ""
    every = list(documented_settings())
    renamed = {new for old, new in KEYS.items() if word in old}
    found = [s for s in every if word in s.key or word in s.text.lower() or s.key in renamed]
    if not found:
        raise ConfigError(
            f"No setting has {word!r} in its key or text."
            + did_you_mean(word, [setting.key for setting in every])
        )
    print("\n\n".join("\n".join(describe(setting)) for setting in found))
