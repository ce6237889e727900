"""Faults are reported with their reasons; videos may change or disappear during a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from stub_cache import SPEC, add, build, encoders, never
from videos import noise

from longreel.data import decode
from longreel.data.cache import Encoders
from longreel.data.listing import Dropped
from longreel.data.write_video import write_video


@pytest.fixture
def poor(folder) -> Path:
    """Make the three good videos and one video of each fault."""
    add(folder, "long_enough.mp4", 13, "25 fps", fps=25)
    add(folder, "short.mp4", 12, "25 fps", fps=25)
    add(folder, "mute.mp4", 20, None)
    for name, data in {"empty": b"", "text": b"hello " * 99}.items():
        (folder / f"{name}.mp4").write_bytes(data)
        (folder / f"{name}.txt").write_text("a fish")
    write_video(folder / "cut.mp4", noise(60), 16)
    (folder / "cut.txt").write_text("noise")
    data = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    return folder


def test_faults_are_reported_and_the_rest_is_used(poor, cache):
    spec = replace(SPEC, windows="all")
    prepared = build(poor, spec, cache)
    dropped = {item.name: item.reason for item in prepared.report.dropped}
    assert dropped.pop("text.mp4").startswith("not a readable video (")
    assert dropped.pop("cut.mp4").startswith("damaged after 1.")
    assert dropped == {
        "empty.mp4": "the file is empty",
        "mute.mp4": "neither a row in metadata.jsonl, metadata.csv or metadata.parquet "
        "nor a file mute.txt",
        "short.mp4": "1 frames (0.1 s) missing: 0.5 s = 8 frames at 16 fps, 9 needed",
    }
    sources = {entry.source for entry in prepared.entries}
    assert sources == {"a.mp4", "b.mp4", "deep/c.mp4", "long_enough.mp4", "cut.mp4"}
    assert "a fish" not in prepared.texts
    lines = prepared.report.lines()
    assert lines[0] == "kept 10 clips of 5 videos: 10 encoded, 0 from the cache"
    assert lines[1] == "dropped 5: 3 undecodable, 1 no caption, 1 too short" and len(lines) == 7
    again = build(poor, spec, cache, never).report
    assert again.dropped == prepared.report.dropped


def test_strict_refuses_faults_before_anything_is_loaded(poor, cache):
    with pytest.raises(ValueError) as caught:
        build(poor, SPEC, cache, never, strict=True)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{poor}: 4 unusable; fix or remove them, or set data.strict=false:"
    assert rest[0] == "  empty.mp4  undecodable: the file is empty" and len(rest) == 4


def test_nothing_left_is_refused_before_anything_is_loaded(tmp_path, cache):
    for index in range(7):
        add(tmp_path / "videos", f"{index}.mp4", 4 + index % 2, "a dog")
    with pytest.raises(ValueError) as caught:
        build(tmp_path / "videos", SPEC, cache, never)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'videos'} gives no clip to train on; "
        "fix the videos or captions, or relax the settings:",
        "  0.mp4  too short: 5 frames (0.3 s) missing: 0.2 s = 4 frames at 16 fps, 9 needed",
        "  1.mp4  too short: 4 frames (0.2 s) missing: 0.3 s = 5 frames at 16 fps, 9 needed",
        "  2.mp4  too short: 5 frames (0.3 s) missing: 0.2 s = 4 frames at 16 fps, 9 needed",
        "  3.mp4  too short: 4 frames (0.2 s) missing: 0.3 s = 5 frames at 16 fps, 9 needed",
        "  4.mp4  too short: 5 frames (0.3 s) missing: 0.2 s = 4 frames at 16 fps, 9 needed",
        "  and 2 more",
    ]


def test_damage_after_the_first_clip_matters_only_if_all_are_wanted(poor, cache):
    def cut(windows: str) -> bool:
        report = build(poor, replace(SPEC, windows=windows), cache).report
        return "cut.mp4" in [item.name for item in report.dropped]

    assert [cut("first"), cut("all"), cut("first")] == [False, True, False]


def test_a_video_that_cannot_be_opened_is_dropped_but_not_remembered(folder, cache, tmp_path):
    """An example is a link into a disk that is not mounted."""
    (folder / "a.mp4").rename(tmp_path / "moved.mp4")
    (folder / "a.mp4").symlink_to(tmp_path / "disk.mp4")
    dropped = build(folder, SPEC, cache).report.dropped
    reason = "cannot be read (No such file or directory)"
    assert dropped == [Dropped("a.mp4", "unreadable", reason)]
    (tmp_path / "moved.mp4").rename(tmp_path / "disk.mp4")
    report = build(folder, SPEC, cache).report
    assert (report.kept, report.encoded, report.reused, report.dropped) == (3, 1, 2, [])


def test_a_video_that_goes_away_after_the_check_is_dropped(folder, cache):
    def load() -> Encoders:
        (folder / "b.mp4").unlink()
        return encoders()

    prepared = build(folder, SPEC, cache, load)
    assert [entry.source for entry in prepared.entries] == ["a.mp4", "deep/c.mp4"]
    reason = "cannot be read (No such file or directory)"
    assert prepared.report.dropped == [Dropped("b.mp4", "unreadable", reason)]


@pytest.mark.parametrize("canonical", [False, True])
def test_a_video_that_is_replaced_while_others_are_encoded_is_not_kept_under_its_old_name(
    folder, cache, canonical
):
    """Pixels of the new video stored under the old one's hash would stay wrong for ever."""
    spec = replace(SPEC, canonical=canonical)
    (folder / "old.mp4").write_bytes((folder / "b.mp4").read_bytes())

    def load() -> Encoders:
        write_video(folder / "b.mp4", noise(40), 16)
        (folder / "a.mp4").touch()  # same content, so nothing is wrong
        return encoders()

    prepared = build(folder, spec, cache, load)
    if canonical:  # the copies were made earlier
        assert [entry.source for entry in prepared.entries] == ["a.mp4", "b.mp4", "deep/c.mp4"]
    else:
        assert [entry.source for entry in prepared.entries] == ["a.mp4", "deep/c.mp4"]
        reason = "cannot be read (it was replaced meanwhile: run again)"
        assert Dropped("b.mp4", "unreadable", reason) in prepared.report.dropped
    build(folder, spec, cache)  # encodes the new video
    (folder / "old.mp4").rename(folder / "b.mp4")
    again = build(folder, spec, cache).entries
    alone = build(folder, spec, cache.with_name("alone")).entries
    assert [e.latents.read_bytes() for e in again] == [e.latents.read_bytes() for e in alone]


def test_a_video_that_is_replaced_while_it_is_checked_is_not_remembered(folder, cache, monkeypatch):
    real = decode.examine

    def slow(path, *arguments, **options):
        facts = real(path, *arguments, **options)
        if path.name == "b.mp4" and not done:
            done.append(add(folder, "b.mp4", 33, "a cat"))
        return facts

    done = []
    monkeypatch.setattr(decode, "examine", slow)
    spec = replace(SPEC, windows="all")
    prepared = build(folder, spec, cache)
    reason = "cannot be read (it was replaced meanwhile: run again)"
    assert prepared.report.dropped == [Dropped("b.mp4", "unreadable", reason)]
    again = build(folder, spec, cache)
    assert [e.start for e in again.entries if e.source == "b.mp4"] == [0, 9, 18]
    assert again.report.dropped == []
