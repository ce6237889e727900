"""Training runs as the tests make them."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from longreel.data.decode import probe, read_clip
from longreel.trainer import loop
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.job import Job
from longreel.trainer.run.metrics import MEASURED, read_rows
from longreel.trainer.step import Learner

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


def train(arguments: list[str], *overrides: str) -> loop.Trainer:
    """Run to the end, or to whatever ends the run; return the trainer of the complete run."""
    return loop.train(Job.from_config(load(with_settings(arguments, *overrides))))


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what is measured, which may not be compared for equality."""
    table = read_rows(run_dir / "metrics.csv")
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in table]


def with_settings(arguments: list[str], *overrides: str) -> list[str]:
    given = dict(argument.partition("=")[::2] for argument in [*arguments, *overrides])
    return [f"{key}={value}" for key, value in given.items()]


def assert_the_same_run(run: Path, expected: Path) -> None:
    """But for the order of sums: metrics, held-out losses and the adapter, as AdamW left it."""
    tables = rows(run), rows(expected)
    assert len(tables[0]) == len(tables[1]) > 4
    for row, wanted in zip(*tables, strict=True):
        for name, value in wanted.items():
            if value.replace(".", "").replace("e-", "").isdigit():
                assert float(row[name]) == pytest.approx(float(value), rel=1e-4), name
            else:
                assert row[name] == value, name
    one, two = (load_file(folder / lora.WEIGHTS) for folder in (run, expected))
    assert one.keys() == two.keys()
    difference = sum((one[name] - two[name]).square().sum() for name in one) ** 0.5
    norm = sum(x.square().sum() for name, x in two.items() if "lora_B" in name) ** 0.5
    print(f"adapter: {difference:.1e} off, {difference / norm:.1e} of what was learnt")
    assert difference < 1e-3 * norm
    assert_alike(*(folder / "samples/step-000004-0.mp4" for folder in (run, expected)))


def assert_alike(*videos: Path) -> None:
    info = probe(videos[0])
    size = {"fps": round(info.fps), "height": info.height, "width": info.width}
    one, two = (read_clip(video, start=0, frames=5, **size).astype(int) for video in videos)
    # Roundings move some blocks of an mp4.
    assert abs(one - two).mean() < 1 < one.std() / 10


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
