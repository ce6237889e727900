"""`longreel train`: train a recipe on one process."""

from __future__ import annotations

USAGE = """\
longreel train recipe=NAME [key=value ...]
accelerate launch train.py recipe=NAME [key=value ...]      on several GPUs"""
OPTIONS = None
TAKES_RECIPE = True


def train(argv: list[str]) -> None:
    """Train as the recipe says; mistakes in it are told before anything heavy is imported."""
    from ..trainer.config.recipe import load

    config = load(argv)
    from ..trainer.job import Job

    job = Job.from_config(config)
    from ..trainer import loop

    loop.train(job)
