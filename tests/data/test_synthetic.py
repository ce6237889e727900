"""Synthetic clips depend only on seed and number, and survive being written as videos."""

import json
import re

import numpy as np
import pytest

from longreel.data.coherence import measure
from longreel.data.decode import examine, read_clip
from longreel.data.listing import SourceSpec
from longreel.data.sources import list_videos
from longreel.data.synthetic import (
    CAPTIONS,
    SETS,
    Arena,
    ClipSet,
    visible_frames,
    write_folder,
)

ARENA = Arena(41, 40, 48, 21)


@pytest.mark.parametrize("name", SETS)
def test_a_clip_depends_on_seed_and_number_alone(name):
    clip = ClipSet(name, ARENA).clip(3)
    assert clip.shape == (41, 40, 48, 3) and clip.dtype == np.uint8
    ClipSet(name, ARENA).clip(0)
    assert np.array_equal(clip, ClipSet(name, ARENA).clip(3))
    others = [ClipSet(name, ARENA).clip(index) for index in range(4, 12)]
    assert any(not np.array_equal(clip, other) for other in others)


def test_the_mix_takes_the_sets_in_turn():
    mix = ClipSet("mix", ARENA)
    for index in range(2 * len(SETS)):
        name = list(SETS)[index % len(SETS)]
        assert np.array_equal(mix.clip(index), ClipSet(name, ARENA).clip(index))
        assert mix.caption(index) in CAPTIONS[name]


def test_the_gap_is_longer_than_the_native_length():
    """So is the turn of the hand: neither fits into a clip of native length."""
    for frames in (41, 81, 161):
        blank = ~visible_frames("occlude", Arena(frames, 40, 48, 21))
        assert 21 < blank.sum() < 30 and not blank[:8].any() and not blank[-8:].any()
    assert (~visible_frames("cross", Arena(81, 40, 48, 21))).sum() == 61
    spin = ClipSet("spin", Arena(21, 40, 48, 21)).scene(0)
    assert abs(spin.angle[-1] - spin.angle[0]) < 1.5 * np.pi


def test_captions_do_not_tell_what_must_be_remembered():
    words = set(re.findall(r"\w+", " ".join(text for pair in CAPTIONS.values() for text in pair)))
    colours = "red green blue yellow magenta cyan purple"
    shapes = "disc circle square plus cross triangle"
    ways = "left right up down clockwise fast slowly"
    assert not words & set(f"{colours} {shapes} {ways}".split())
    # Nor does a hidden rule: each caption comes with every colour equally often.
    source = ClipSet("bounce", ARENA)
    seen = {}
    for index in range(600):
        key = source.caption(index), int(source.scene(index).colour[0])
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 12 and min(seen.values()) > 25 and max(seen.values()) < 80


def test_identities_are_spread_evenly():
    scenes = [ClipSet("occlude", ARENA).scene(index) for index in range(300)]
    for values, count in (([s.colour[0] for s in scenes], 6), ([s.shape[0] for s in scenes], 4)):
        shares = np.bincount(values, minlength=count) / len(scenes)
        assert len(shares) == count and abs(shares - 1 / count).max() < 0.09


def test_a_folder_of_videos_keeps_what_is_measured(tmp_path):
    """The figures stay the same through H.264 and at another size."""
    arena = Arena(21, 64, 112, 16)
    source = ClipSet("mix", arena, seed=3)
    folder = write_folder(source, 7, 16, tmp_path)
    listing = list_videos(SourceSpec(path=str(folder)))
    videos, dropped = listing.sources, listing.dropped
    assert len(videos) == 7 and not dropped
    for video in videos:
        name, index = video.name.removesuffix(".mp4").split("-")
        assert video.caption == source.caption(int(index))
        clip = read_clip(video.path, start=0, frames=21, fps=16, height=64, width=112)
        found, meant = (measure(name, c, 16) for c in (clip, source.clip(int(index))))
        for key in ("visible", "ends", "switches", "agree@4", "trajectory_rmse"):
            if key in meant:
                assert found[key] == pytest.approx(meant[key], abs=0.01, nan_ok=True), (name, key)
        assert found.get("angular_speed_error", 0) < 0.03
        assert found.get("loop_far", 60) > 30 and found.get("clock_error", 0) < 0.03


def test_an_interrupted_folder_goes_on_where_it_stopped(tmp_path):
    source = ClipSet("clock", Arena(8, 24, 24, 8))
    folder = write_folder(source, 3, 8, tmp_path)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"clock-0000{i}.mp4" for i in range(3)]
    kept = (folder / "clock-00000.mp4").stat().st_mtime_ns
    (folder / "clock-00001.mp4").unlink()
    (folder / "metadata.jsonl").unlink()
    assert write_folder(source, 3, 8, tmp_path) == folder
    assert (folder / "clock-00000.mp4").stat().st_mtime_ns == kept
    assert examine(folder / "clock-00001.mp4", 8).frames == 8
    assert write_folder(source, 4, 8, tmp_path) != folder
    assert write_folder(ClipSet("clock", Arena(8, 24, 24, 8), seed=1), 3, 8, tmp_path) != folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClipSet("hop", ARENA), "synthetic:hop.*bounce, occlude"),
        (lambda: Arena(4, 40, 48, 21), "fewer than 8"),
        (lambda: Arena(41, 16, 48, 21), "24 pixels"),
    ],
)
def test_bad_sets_and_sizes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
