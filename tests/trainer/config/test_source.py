"""data.source: clips that are drawn, in place of a folder."""

from pathlib import Path

import pytest
from runs import rows, train

from longreel.data.listing import SourceSpec
from longreel.data.sources import list_videos
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.job import Job
from longreel.trainer.loop import check_trainable

SYNTHETIC = ("data.path=null", "data.source=synthetic:mix", "data.synthetic.clips=3")


def test_a_run_trains_on_drawn_clips(arguments):
    trainer = train(arguments, *SYNTHETIC, "train.steps=2")
    cache = Path(trainer.config.cache.dir)
    (folder,) = cache.glob("synthetic/mix-17x64x64-native9-16fps-seed0-*")
    videos = list_videos(SourceSpec(path=str(folder))).sources
    assert [video.name for video in videos] == [
        "bounce-00000.mp4", "cross-00002.mp4", "occlude-00001.mp4",
    ]  # fmt: skip
    assert len([row for row in rows(trainer.run_dir) if row["loss"]]) == 2


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("run.dir", "^run.dir=.*/taken/below: .*/taken is a file, not a folder.$"),
        ("cache.dir", "^The cache's folder .*/taken/below cannot be made .Not a directory.: name"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_told(key, words, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    given = {"recipe": "tiny_wan", "data.path": str(tmp_path), "cache.dir": str(tmp_path / "c")}
    given |= {key: str(taken / "below")}
    with pytest.raises(ConfigError, match=words):
        check_trainable(Job.from_config(load([f"{k}={v}" for k, v in given.items()])))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.source=synthetic:hop"], "data.source=synthetic:hop is not a set.*bounce, occlude"),
        (["data.source=files"], "data.source=files is unknown: take folder, openvid"),
        (["data.source=synthetic:pan", "data.path=."], "leave one out"),
        (["data.source=synthetic:pan", "height=16"], "24 pixels"),
        (["data.source=synthetic:pan", "data.synthetic.clips=0"], "clips=0 must be positive"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(settings, words, tmp_path):
    given = ["recipe=tiny_wan", f"cache.dir={tmp_path}", "height=64", "width=64", *settings]
    merged = dict(pair.partition("=")[::2] for pair in given)
    with pytest.raises(ConfigError, match=words):
        check_trainable(Job.from_config(load([f"{k}={v}" for k, v in merged.items()])))
    assert not (tmp_path / "synthetic").exists()
