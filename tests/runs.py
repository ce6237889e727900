"""Training runs as the tests make them."""

import csv
from pathlib import Path

import pytest

from longreel.trainer.job import Job
from longreel.trainer.learner import Learner
from longreel.trainer.loop import Trainer
from longreel.trainer.recipe import load

TIMES = ("seconds_per_step", "tokens_per_second", "peak_memory_gib")


# Native frames of a run in a few seconds; twice that is 17, 21 or 19 frames.
SHORT = {"wan": 9, "hunyuan": 9, "mochi": 7}


def arguments_of(family: str, videos: Path, cache: Path, run_dir: Path) -> list[str]:
    """A complete run in a few seconds: latent frames of 4 x 4 patches, 4 steps."""
    return [
        f"recipe=tiny_{family}",
        f"data.path={videos}",
        f"cache.dir={cache}",
        f"run.dir={run_dir}",
        f"extend.native={SHORT[family]}",
        "height=64",
        "width=64",
        "sparse.block=16",
        "lora.rank=4",
        "train.steps=4",
        "train.warmup=1",
        "checkpoint.every=2",
        "validate.every=4",
        "validate.prompts=[]",
        "validate.steps=2",
        "log.wandb=false",
    ]


def train(arguments: list[str], *overrides: str) -> Trainer:
    given = dict(argument.partition("=")[::2] for argument in [*arguments, *overrides])
    trainer = Trainer(Job.from_config(load([f"{k}={v}" for k, v in given.items()])))
    trainer.fit()
    return trainer


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run_dir / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


class Interrupted(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run ends without notice when it reaches an optimizer update."""
    real = Learner.update

    def stopping(self: Learner, current: int, batches):
        if current == step:
            raise Interrupted
        return real(self, current, batches)

    monkeypatch.setattr(Learner, "update", stopping)
