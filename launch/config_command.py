"""`longreel config`: the settings that a run would have."""

from __future__ import annotations

USAGE = "longreel config recipe=NAME [key=value ...]"
OPTIONS = None
TAKES_RECIPE = True


def config(argv: list[str]) -> None:
    """Print the settings as YAML, with what the model decides filled in; it is a recipe itself."""
    from ..trainer.config.recipe import load, to_yaml

    settings = load(argv)
    from ..trainer.job import Job
    from ..trainer.run.progress import quiet_libraries

    quiet_libraries()
    print(to_yaml(Job.from_config(settings, published=True).config), end="")
