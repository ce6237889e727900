"""The `longreel` command: each of its commands is a file `NAME_command.py` beside this one.

Such a file has a function NAME, which takes the arguments, a USAGE line, and OPTIONS, the schema of
the command's own keys. It is imported when its command is called, so that help comes at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "train": "Train a LoRA as a recipe says, on one process.",
    "sample": "Generate a video with a trained adapter.",
    "export": "Write an adapter in the format that ComfyUI loads.",
    "plan": "Predict a recipe's memory, time and cost, and what fits; no GPU, no weights.",
    "recipes": "List the recipes with their length, tokens, and predicted memory and time.",
    "config": "Print the settings that a run would have, without starting it.",
    "settings": "Explain the settings of recipes, all of them or those that match a word.",
    "draw": "Draw a recipe's attention mask, and say how much and how far it attends.",
    "analyze": "Measure how attention falls with distance and what each mask leaves of it.",
    "cache": "Verify, clean or look into the cache of latents and text embeddings.",
}
HELP = {"-h", "--help"}


def main(argv: list[str] | None = None) -> None:
    """Run one command. A mistake in its arguments ends the process with one message."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in HELP | {"help"}:
        print(overview())
        return
    if argv[0] in {"--version", "version"}:
        print(f"longreel {version('longreel')}")
        return
    name, *rest = argv
    if name not in COMMANDS:
        raise SystemExit(f"error: {name!r} is no command.\n\n{overview()}")
    module = import_module(f".{name}_command", __package__)
    if HELP & set(rest):
        from .usage import usage

        print(usage(name, COMMANDS[name], module))
        return
    from ..trainer.config.values import ConfigError

    try:
        command: Any = getattr(module, name)
        command(rest)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def overview() -> str:
    """List the commands, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "longreel COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "`longreel COMMAND --help` lists its keys, `longreel --version` tells the version.",
            "Training on several GPUs: accelerate launch train.py recipe=NAME [key=value ...]",
        ]
    )


if __name__ == "__main__":
    main()
