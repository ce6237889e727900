"""Videos give clips by buckets, shots, times and sizes, and the report comes before any work."""

import json
from dataclasses import replace

import numpy as np
import pytest
from stub_cache import BUCKET, SPEC, add, build, encoders, never
from videos import make_video, noise, numbers, painted

from longreel.data.cache import Bucket
from longreel.data.captions import CaptionLimit
from longreel.data.decode import examine, read_clip
from longreel.data.files import read_header
from longreel.data.manifest import read_manifests
from longreel.data.shots import shots


def places(prepared) -> list[tuple[str, int, int, int, int]]:
    return [
        (e.source, e.start, e.bucket.frames, e.bucket.height, e.bucket.width)
        for e in prepared.entries
    ]


def dropped(prepared) -> dict[str, tuple[str, str]]:
    return {item.name: (item.kind, item.reason) for item in prepared.report.dropped}


def test_videos_go_to_the_bucket_of_the_nearest_aspect_and_the_longest_that_fits(tmp_path):
    folder = tmp_path / "v"
    sizes = {"wide": (32, 64), "tall": (64, 32), "square": (48, 48)}
    for name, (height, width) in sizes.items():
        add(folder, f"{name}.mp4", 24, name, frames=[painted(i, height, width) for i in range(24)])
    buckets = tuple(
        Bucket(frames, *size) for frames in (17, 5) for size in [(32, 48), (48, 32), (32, 32)]
    )
    spec = replace(SPEC, buckets=buckets, windows="all")
    prepared = build(folder, spec, tmp_path / "cache")
    assert places(prepared) == [
        ("square.mp4", 0, 17, 32, 32),
        ("square.mp4", 17, 5, 32, 32),
        ("tall.mp4", 0, 17, 48, 32),
        ("tall.mp4", 17, 5, 48, 32),
        ("wide.mp4", 0, 17, 32, 48),
        ("wide.mp4", 17, 5, 32, 48),
    ]
    for entry in prepared.entries:
        shape = [3, entry.bucket.frames, entry.bucket.height // 8, entry.bucket.width // 8]
        assert read_header(entry.latents)["shape"] == shape
    assert str(prepared.report).splitlines()[1] == "  17 x 48 x 32: 1 clip"
    first = build(folder, replace(spec, windows="first"), tmp_path / "cache", never)
    assert [place[2] for place in places(first)] == [17, 17, 17]
    # A bucket without clips is counted too.
    (folder / "tall.mp4").unlink()
    lines = str(build(folder, spec, tmp_path / "cache", never).report).splitlines()
    assert "  17 x 48 x 32: 0 clips" in lines


def scenes(*lengths: int) -> list[np.ndarray]:
    """Draw shots of moving waves that differ in brightness and colour."""
    y, x = np.mgrid[:48, :64]
    frames = []
    for shot, length in enumerate(lengths):
        for t in range(length):
            waves = 60 * np.sin((x + 3 * t) / (4 + shot)) * np.cos(y / 6)
            colour = np.roll([60, 120, 190], shot)
            frames.append(np.clip(waves[..., None] + colour, 0, 255).astype(np.uint8))
    return frames


def test_windows_do_not_cross_cuts(tmp_path):
    folder = tmp_path / "v"
    frames = scenes(12, 7, 25)
    add(folder, "a.mp4", len(frames), "a", frames=frames)
    add(folder, "b.mp4", 14, "b", frames=scenes(7, 7))
    assert examine(folder / "a.mp4", 16, find_cuts=True).cuts == [12, 19]
    spec = replace(SPEC, windows="all", shots=True)
    prepared = build(folder, spec, tmp_path / "cache")
    assert [(e.source, e.start) for e in prepared.entries] == [
        ("a.mp4", 0),
        ("a.mp4", 19),
        ("a.mp4", 28),
    ]
    kind, reason = dropped(prepared)["b.mp4"]
    assert kind == "crosses a cut"
    assert reason == (
        "the longest of 2 shots is 2 frames (0.1 s) missing: 0.4 s = 7 frames at 16 fps, 9 needed"
    )
    across = build(folder, replace(spec, shots=False), tmp_path / "cache")
    assert [e.start for e in across.entries if e.source == "a.mp4"] == [0, 9, 18, 27]


def test_shots_end_where_the_next_begins():
    assert shots(10, [3, 7]) == [range(0, 3), range(3, 7), range(7, 10)]
    assert shots(5, [7]) == [range(0, 5)] and shots(0, []) == []


def test_fast_motion_and_flashes_of_light_are_no_cuts(tmp_path):
    y, x = np.mgrid[:48, :64]
    fast = [
        np.repeat((127 + 120 * np.sin((x + 9 * t) / 3))[..., None], 3, 2).astype(np.uint8)
        for t in range(20)
    ]
    path = make_video(tmp_path / "a.mp4", range(20), per_second=16, frames=fast)
    assert examine(path, 16, find_cuts=True).cuts == []


def test_times_of_a_table_bound_the_windows(tmp_path):
    folder = tmp_path / "v"
    add(folder, "a.mp4", 48, "unused")
    rows = [("one", 0, 1.0), ("two", 1.0, None), ("short", 0.5, 1.0), ("late", 9, None)]
    lines = [
        json.dumps({"file_name": "a.mp4", "caption": c, "start": s, "end": e}) for c, s, e in rows
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    prepared = build(folder, replace(SPEC, windows="all"), tmp_path / "cache")
    assert [(e.caption, e.start) for e in prepared.entries] == [
        ("one", 0),
        ("two", 16),
        ("two", 25),
        ("two", 34),
    ]
    reasons = [item.reason for item in prepared.report.dropped]
    assert reasons == [
        "1 frames (0.1 s) missing: 0.5 s = 8 frames at 16 fps, 9 needed",
        "9 frames (0.6 s) missing: 0.0 s = 0 frames at 16 fps, 9 needed",
    ]
    first = build(folder, SPEC, tmp_path / "other")
    assert [(e.caption, e.start) for e in first.entries] == [("one", 0), ("two", 16)]


def test_videos_that_would_be_enlarged_too_much_are_dropped(tmp_path):
    folder = tmp_path / "v"
    for name, size in {"small": (16, 24), "enough": (22, 32), "large": (64, 96)}.items():
        add(folder, f"{name}.mp4", 12, name, frames=[painted(i, *size) for i in range(12)])
    prepared = build(folder, replace(SPEC, least_scale=0.6), tmp_path / "cache")
    assert [e.source for e in prepared.entries] == ["enough.mp4", "large.mp4"]
    assert dropped(prepared)["small.mp4"] == (
        "too small",
        "16 x 24 pixels would be enlarged 2.00 times for 32 x 48; data.least_scale=0.6 allows 1.67",
    )
    assert len(build(folder, SPEC, tmp_path / "cache").entries) == 3


def test_the_report_comes_before_any_work(tmp_path):
    folder, cache = tmp_path / "v", tmp_path / "cache"
    add(folder, "a.mp4", 20, "a dog")
    add(folder, "b.mp4", 12, "a cat")
    add(folder, "c.mp4", 5, "a bird")
    spec = replace(SPEC, windows="all", buckets=(replace(BUCKET, tokens=1000, bytes=50_000_000),))
    seen = []

    def load():
        seen.append("load")
        return encoders()

    build(folder, spec, cache, load, announce=lambda report: seen.append(str(report)))
    before, *_ = seen
    assert before.splitlines() == [
        "kept 3 clips of 2 videos: 3 to encode, 0 from the cache",
        "3,000 tokens an epoch, 150.0 MB of latents, 150.0 MB of them to be written in "
        "a time that is unknown before the first clip",
        "dropped 1: 1 too short",
        "  c.mp4  too short: 4 frames (0.2 s) missing: 0.3 s = 5 frames at 16 fps, 9 needed",
    ]
    assert seen[1] == "load"
    add(folder, "d.mp4", 13, "a horse")  # the speed is known by now
    build(folder, spec, cache, announce=lambda report: seen.append(str(report)))
    assert "50.0 MB of them to be written in about 0 s" in seen[-1]


def test_a_report_names_some_of_each_kind_and_the_manifest_all(tmp_path):
    folder, cache = tmp_path / "v", tmp_path / "cache"
    add(folder, "good.mp4", 12, "good")
    for index in range(8):
        add(folder, f"short{index}.mp4", 3, "short")
    (folder / "broken.mp4").write_bytes(b"x")
    (folder / "broken.txt").write_text("broken")
    report = build(folder, SPEC, cache).report
    lines = report.lines()
    assert lines[1] == "dropped 9: 8 too short, 1 undecodable"
    assert lines[7] == "  and 3 more" and lines[8].startswith("  broken.mp4")
    (manifest,) = read_manifests(cache)
    names = manifest.path.with_suffix(".dropped.jsonl").read_text().splitlines()
    assert len(names) == 9 and json.loads(names[0])[1] == "undecodable"
    with pytest.raises(ValueError, match="9 unusable; fix or remove them"):
        build(folder, SPEC, cache, never, strict=True)


def test_captions_that_are_too_long_are_told_with_what_is_cut(tmp_path):
    folder, cache = tmp_path / "v", tmp_path / "cache"
    long = " ".join(f"word{i}" for i in range(30))
    add(folder, "a.mp4", 12, long)
    add(folder, "b.mp4", 12, "short")
    measured = []

    def measure(caption):
        measured.append(caption)
        words = caption.split()
        return len(words), " ".join(words[20:])

    limit = CaptionLimit(20, measure)
    (note,) = build(folder, SPEC, cache, caption_limit=limit).report.notes
    assert note.startswith("caption 'word0 word1 word2 ")
    assert "has 30 tokens, of which the model reads 20; cut: 'word20 word21 " in note
    assert build(folder, SPEC, cache, caption_limit=limit).report.notes == [note]
    assert measured == [long]  # once, and only the caption that may be too long


def test_a_picture_under_a_video_s_name_is_too_short(tmp_path):
    import av

    folder = tmp_path / "v"
    add(folder, "a.mp4", 12, "a")
    add(folder, "really.mkv", 12, "an mkv").rename(folder / "named.mp4")
    (folder / "really.txt").rename(folder / "named.txt")
    frame = av.VideoFrame.from_ndarray(painted(3), format="rgb24")
    frame.save(str(tmp_path / "one.png"))
    (tmp_path / "one.png").rename(folder / "one.mp4")
    (folder / "one.txt").write_text("a picture")
    prepared = build(folder, SPEC, tmp_path / "cache")
    assert [e.source for e in prepared.entries] == ["a.mp4", "named.mp4"]  # by content
    assert dropped(prepared)["one.mp4"][0] == "too short"


def test_a_video_replaced_by_one_of_the_same_size_and_ends_is_encoded_anew(tmp_path):
    """Only the middle of its content differs, which a hash of both ends would miss."""
    folder, cache = tmp_path / "v", tmp_path / "cache"
    path = add(folder, "a.mkv", 24, "a", frames=noise(24, 256, 256), codec="rawvideo")
    assert path.stat().st_size > 2 << 20
    (before,) = build(folder, SPEC, cache).entries
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 50_000] = bytes(50_000)
    path.write_bytes(data)
    (after,) = build(folder, SPEC, cache).entries
    assert after.latents != before.latents and after.id == before.id


def test_canonical_copies_are_made_once_and_give_the_same_clips(tmp_path):
    folder, cache = tmp_path / "v", tmp_path / "cache"
    path = make_video(folder / "a.avi", range(40), per_second=25, options={"bf": "3"})
    (folder / "a.txt").write_text("a")
    spec = replace(SPEC, windows="all", canonical=True)
    prepared = build(folder, spec, cache)
    (copy,) = (cache / "canonical").rglob("*.mp4")
    size = {"start": 0, "frames": 25, "fps": 16, "height": 48, "width": 64}
    assert numbers(read_clip(copy, **size)) == numbers(read_clip(path, **size))
    assert [e.start for e in prepared.entries] == [0, 9]
    import av

    with av.open(str(copy)) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
        times = [round(p.pts * p.time_base * 16) for p in packets]
    assert times == list(range(26))  # no B-frames: storage order is display order
    assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, 16]
    before = copy.stat().st_mtime_ns
    assert build(folder, spec, cache, never).entries == prepared.entries
    copy.unlink()  # a full cache needs no copy
    assert build(folder, spec, cache, never).entries == prepared.entries
    assert not copy.exists()
    for path in (cache / "manifests").iterdir():
        path.unlink()
    assert build(folder, spec, cache, never).entries == prepared.entries
    assert copy.stat().st_mtime_ns != before
    (folder / "bad.mp4").write_bytes(b"x")
    (folder / "bad.txt").write_text("x")
    assert dropped(build(folder, spec, cache, never))["bad.mp4"][0] == "undecodable"
