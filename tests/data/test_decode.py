"""Frames are read by their timestamps; damaged and foreign files are refused with the reason."""

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import gaps, make_video, noise, numbers, on_show, steady

from longreel.data.decode import DecodeError, examine, probe, read_clip, read_clips
from longreel.data.write_video import write_video


def clip_count_frames(path, fps, limit=None) -> int:
    facts = examine(path, fps, limit)
    if facts.fault:
        raise DecodeError(path.name, facts.fault, facts.frames)
    return facts.frames


SMALL = {"height": 48, "width": 64}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"options": {"bf": "3"}}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx", "options": {"b": "4000000"}}),
        ("a.mpg", {"codec": "mpeg2video"}),  # its first timestamp is half a second
        ("a.avi", {"codec": "mpeg4", "options": {"b": "4000000"}}),
        ("b_frames.avi", {"options": {"bf": "3"}}),  # timestamps in storage order
        ("a.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    ],
)
def test_resampling_keeps_time_in_every_container(tmp_path, name, options):
    path = steady(tmp_path / name, 50, **options)
    times = [index / 25 for index in range(50)]
    assert clip_count_frames(path, 16) == 32
    clip = read_clip(path, start=0, frames=32, fps=16, **SMALL)
    assert clip.dtype == np.uint8 and clip.shape == (32, 48, 64, 3)
    assert numbers(clip) == on_show(times, 16, 32)
    assert numbers(read_clip(path, start=5, frames=7, fps=16, **SMALL)) == on_show(times, 16, 7, 5)


@pytest.mark.parametrize("fps", [25, 50, 12.5, 24000 / 1001])
def test_rates_below_at_and_above_the_video(tmp_path, fps):
    path = steady(tmp_path / "a.mp4", 50)
    count = clip_count_frames(path, fps)
    assert count == int(np.ceil(2 * fps - 1e-6))
    clip = read_clip(path, start=0, frames=count, fps=fps, **SMALL)
    assert numbers(clip) == on_show([index / 25 for index in range(50)], fps, count)


def test_frames_of_a_millisecond_container_are_not_late(tmp_path):
    """30 frames a second are 0, 33, 67, ... ms in Matroska: some round up past their time."""
    path = steady(tmp_path / "a.mkv", 50, 30)
    assert numbers(read_clip(path, start=0, frames=50, fps=30, **SMALL)) == list(range(50))


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.integers(10, 700), min_size=2, max_size=12),
    fps=st.sampled_from([5, 8, 16, 24, 30]),
    suffix=st.sampled_from([".mp4", ".mkv"]),
)
def test_variable_frame_rate(tmp_path_factory, steps, fps, suffix):
    times = np.cumsum([0, *steps]).tolist()
    path = make_video(tmp_path_factory.mktemp("vfr") / f"a{suffix}", times)
    seconds = [time / 1000 for time in times]
    count = clip_count_frames(path, fps)
    last = seconds[-1] * fps
    assert last - 0.1 <= count <= last + max(gaps(seconds)[-1], 1e-3) * fps + 1.1
    clip = read_clip(path, start=0, frames=count, fps=fps, **SMALL)
    assert numbers(clip) == on_show(seconds, fps, count)


def test_dropped_frames_hold_the_picture_and_do_not_speed_motion_up(tmp_path):
    path = make_video(tmp_path / "a.mp4", [0, 1, 2, 12, 13, 14], per_second=10)
    clip = read_clip(path, start=0, frames=15, fps=10, **SMALL)
    assert numbers(clip) == [0, 1, *[2] * 10, 3, 4, 5]


def test_the_last_frame_stays_as_long_as_its_container_says(tmp_path):
    """The frame before it stays for ten ticks, which must not be repeated."""
    path = make_video(tmp_path / "a.mkv", [0, 1, 2, 12], per_second=10, options={"bf": "0"})
    assert clip_count_frames(path, 10) == 13


@pytest.mark.parametrize("starts", [[0, 9, 18], [0, 4, 8, 12], [3, 20], [0, 1, 25], [2, 2]])
def test_many_clips_in_one_pass_are_the_single_ones(tmp_path, starts):
    path = steady(tmp_path / "a.mp4", 50)
    size = {"frames": 7, "fps": 16, **SMALL}
    clips = list(read_clips(path, starts=starts, **size))
    assert [start for start, _ in clips] == starts
    for start, clip in clips:
        assert np.array_equal(clip, read_clip(path, start=start, **size))


def test_counting_stops_at_the_limit(tmp_path):
    assert clip_count_frames(steady(tmp_path / "a.mp4", 50), 25, limit=7) == 7


def failure(call, *args, **kwargs) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_files_that_are_no_video(tmp_path):
    empty, text, sound = (tmp_path / name for name in ("empty.mp4", "text.mp4", "sound.mp4"))
    empty.touch()
    text.write_text("this is not a video\n" * 50)
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for call in (probe, lambda path: clip_count_frames(path, 16)):
        assert str(failure(call, empty)) == "empty.mp4: the file is empty"
        assert str(failure(call, text)).startswith("text.mp4: not a readable video (")
        assert str(failure(call, sound)) == "sound.mp4: there is no video stream in it"
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "missing.mp4")


def test_short_video(tmp_path):
    path = steady(tmp_path / "a.mp4", 25)
    error = failure(read_clip, path, start=8, frames=9, fps=16, **SMALL)
    assert str(error) == "a.mp4: 1 frames (0.1 s) missing: 1.0 s = 16 frames at 16 fps, 17 needed"
    assert error.frames == 16


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damage_is_found_by_decoding_and_what_comes_before_it_is_usable(tmp_path, damage):
    """The header at the front of a faststart mp4 still promises all 60 frames."""
    path = tmp_path / "a.mp4"
    write_video(path, noise(60), 25)
    whole = read_clip(path, start=0, frames=20, fps=25, height=64, width=64)
    data = path.read_bytes()
    middle = len(data) * 6 // 10
    rest = b"" if damage == "cut" else noise(1)[0].tobytes()[:3000]
    path.write_bytes(data[:middle] + rest + (data[middle + 3000 :] if rest else b""))
    assert probe(path).duration == pytest.approx(2.4)
    error = failure(clip_count_frames, path, 25)
    assert error.reason.startswith("damaged after 1.") and 25 < error.frames < 45
    again = read_clip(path, start=0, frames=20, fps=25, height=64, width=64)
    assert np.array_equal(whole, again)
    last = error.frames - 1
    assert read_clip(path, start=last, frames=1, fps=25, height=64, width=64).shape[0] == 1
    failure(read_clip, path, start=last, frames=2, fps=25, height=64, width=64)


def test_a_video_cut_within_its_first_frame(tmp_path):
    write_video(tmp_path / "a.mp4", noise(10), 25)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: data.index(b"mdat") + 1000])
    error = failure(clip_count_frames, tmp_path / "a.mp4", 25)
    assert str(error).startswith("a.mp4: no frame can be decoded (Invalid data")
    assert error.frames == 0


def test_a_recording_that_begins_between_key_frames_is_read(tmp_path):
    path = tmp_path / "a.ts"
    options = {"g": "10", "bf": "0", "x264-params": "repeat-headers=1"}
    make_video(path, range(60), per_second=25, frames=noise(60), options=options)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 4 // 188 * 188 :])  # whole packets of a transport stream
    assert 30 <= clip_count_frames(path, 25) <= 50
