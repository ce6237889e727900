"""Settings of `data` in a job: buckets, refusals, and a run on clips of several shapes."""

import json
from contextlib import contextmanager
from math import prod

import pytest
import torch
from accelerate import Accelerator
from runs import arguments_of, rows, train
from videos import write_waves

from longreel.trainer import clips
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.job import Job


def job(*options: str) -> Job:
    return Job.from_config(load(["recipe=wan_1_3b_2x", "model.path=tiny", *options]))


def shapes(job: Job) -> list[tuple[int, int, int]]:
    return [(b.frames, b.height, b.width) for b in job.buckets()]


def test_one_bucket_unless_asked():
    one = job()
    (bucket,) = one.buckets()
    assert shapes(one) == [(161, 480, 832)]
    assert bucket.tokens == one.grid(161).video
    assert bucket.bytes == 2 * prod(one.latent_shape(161))


def test_lengths_and_aspects_make_buckets_on_the_model_s_grid():
    given = job("data.lengths=[81,41]", "data.aspects=[16:9,1:1,9:16]")
    found = shapes(given)
    assert [frames for frames, *_ in found] == [161] * 3 + [81] * 3 + [41] * 3
    largest = given.grid(161).video
    for bucket in given.buckets():
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert bucket.tokens <= largest and bucket.height * bucket.width >= 0.9 * 480 * 832
    wide, square, tall = found[:3]
    assert wide[1:] == tall[:0:-1] == (480, 832)
    assert abs(square[2] / square[1] - 1) < 0.04  # the nearest that loses no pixel
    assert abs(wide[2] / wide[1] - 16 / 9) < 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.lengths=[80]"], "data.lengths: frames=80: wan takes 4k + 1 frames"),
        (["data.lengths=[201]"], "data.lengths: 201 is more than the 161 frames"),
        (["data.lengths=[0]"], "data.lengths: 0 must be positive"),
        (["data.aspects=[wide]"], "data.aspects: wide is not of the form WIDTH:HEIGHT"),
        (["data.aspects=[1:99999]"], "data.aspects: 1:99999 does not fit in 480 x 832 pixels"),
        (["data.top_k=3"], "data.top_k is set and data.top_by is not"),
        (["data.top_by=score"], "data.top_by is set and data.top_k is not"),
        (["data.top_k=0", "data.top_by=x"], "data.top_k=0 must be positive"),
        (["data.least_scale=1.5"], "data.least_scale=1.5 must be at least 0 and at most 1."),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError) as error:
        job(*options)
    assert message in str(error.value)


def test_a_run_on_clips_of_several_shapes(tmp_path):
    """Two lengths, two aspects, a batch of two: every step is of one shape, and it resumes."""
    videos = write_waves(tmp_path / "v", 3, 20, 64, 64, 16)
    write_waves(tmp_path / "w", 3, 11, 64, 64, 16)
    write_waves(tmp_path / "t", 2, 20, 64, 32, 16)
    for name in "wt":
        for path in (tmp_path / name).iterdir():
            path.rename(videos / f"{name}{path.name}")
    given = arguments_of("wan", videos, tmp_path / "cache", tmp_path / "run")
    given += ["data.lengths=[9]", "data.aspects=[1:1,1:2]", "train.batch=2"]
    given += ["extend.factor=2", "validate.videos=1", "data.least_scale=0.3"]
    trainer = train(given, "train.steps=6", "validate.every=6")
    cached = trainer.job.buckets()
    assert len(cached) == 4
    found = [
        json.loads(line)
        for p in (tmp_path / "cache" / "manifests").glob("*.jsonl")
        if "dropped" not in p.name
        for line in p.read_text().splitlines()[1:]
    ]
    assert len(found) == 8
    first = rows(tmp_path / "run")
    assert len({row["attention_pflop"] for row in first if row["loss"]}) > 1  # shapes differ
    again = [x if not x.startswith("run.dir") else f"run.dir={tmp_path / 'again'}" for x in given]
    train(again, "train.steps=3", "validate.every=6", "checkpoint.every=3")
    train(again, "train.steps=6", "validate.every=6", "checkpoint.every=3")
    losses = [row["loss"] for row in first if row["loss"]]
    assert [row["loss"] for row in rows(tmp_path / "again") if row["loss"]] == losses


def test_one_process_lists_the_videos_before_the_others(tmp_path, monkeypatch):
    """A data set on the Hub is fetched once, not by each process."""
    told = []

    class First(Accelerator):
        @contextmanager
        def main_process_first(self):
            told.append("in")
            yield
            told.append("out")

    def lists(spec):
        told.append(spec.path)
        raise ValueError("enough")

    monkeypatch.setattr(clips, "list_videos", lists)
    with pytest.raises(ConfigError, match="enough"):
        clips.prepare_data(job(f"data.path={tmp_path}"), First(cpu=True), torch.float32)
    assert told == ["in", str(tmp_path)]


def test_a_filter_that_does_not_parse_ends_the_run_before_anything_loads(tmp_path):
    videos = write_waves(tmp_path / "v", 1, 20, 64, 64, 16)
    given = arguments_of("wan", videos, tmp_path / "cache", tmp_path / "run")
    with pytest.raises(ConfigError, match="data.filter=score >: a number or 'text' is missing"):
        train(given, "data.filter=score >")
