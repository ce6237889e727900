import struct
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import gaps, make_video, noise, numbers, on_show, painted, steady

from longreel.data.decode import (
    DecodeError,
    VideoInfo,
    examine,
    probe,
    read_clip,
    read_clips,
    write_video,
)


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
        ("b_frames.avi", {"options": {"bf": "3"}}),  # timestamps in the order of storage
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
    """Not for the ten ticks that the one before it did."""
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


def quadrants(height: int, width: int) -> np.ndarray:
    """Red, green / blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255, 0, 0
    pixels[: height // 2, width // 2 :] = 0, 255, 0
    pixels[height // 2 :, : width // 2] = 0, 0, 255
    pixels[height // 2 :, width // 2 :] = 255
    return pixels


def corners(frame: np.ndarray) -> str:
    """Colours of `frame`'s corners by row."""
    high, wide = frame.shape[0] - 5, frame.shape[1] - 5
    names = {(True, False, False): "R", (False, True, False): "G", (False, False, True): "B"}
    picked = [frame[y, x] > 127 for y in (4, high) for x in (4, wide)]
    return "".join(names.get(tuple(bool(c) for c in colour), "W") for colour in picked)


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [((0, 1, -1, 0), "BRWG"), ((-1, 0, 0, -1), "WBGR"), ((0, -1, 1, 0), "GWRB")],
    ids=["90", "180", "270"],
)
def test_rotation_is_applied(tmp_path, matrix, seen):
    path = steady(tmp_path / "a.mp4", 4, frames=[quadrants(64, 96)] * 4)
    assert corners(read_clip(path, start=0, frames=1, fps=25, height=64, width=96)[0]) == "RGBW"
    # Phones store the matrix [a b u, c d v, x y w] of the track header, in 16.16 and 2.30.
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (entry << 16 for entry in matrix)
    data = path.read_bytes()
    at = data.index(unit, data.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + turned + data[at + len(unit) :])
    info = probe(path)
    size = (96, 64) if matrix[0] == 0 else (64, 96)
    assert (info.height, info.width) == size
    clip = read_clip(path, start=0, frames=4, fps=25, height=size[0], width=size[1])
    assert clip.shape == (4, *size, 3)
    assert corners(clip[0]) == seen


def test_covers_then_crops_the_centre(tmp_path):
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # the middle third
    path = steady(tmp_path / "a.mkv", 2, frames=[pixels] * 2, codec="ffv1", pix_fmt="yuv444p")
    square = read_clip(path, start=0, frames=1, fps=25, height=30, width=30)[0]
    bright = square[15, :, 0] > 127
    assert bright.sum() == 20 and bright[5:25].all()
    tall = read_clip(path, start=0, frames=1, fps=25, height=60, width=30)[0]
    assert (tall > 127).all()


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    pixels = np.zeros((64, 48, 3), np.uint8)
    pixels[:16] = 255  # would be cropped if the picture were taken for a tall one
    path = steady(tmp_path / "a.mp4", 2, frames=[pixels] * 2, pixel_aspect=Fraction(2))
    assert probe(path) == VideoInfo(fps=25.0, duration=0.08, width=96, height=64)
    clip = read_clip(path, start=0, frames=1, fps=25, height=64, width=96)
    assert (clip[0, :14] > 200).all() and (clip[0, 18:] < 50).all()


def test_odd_sizes(tmp_path):
    frames = [painted(index, 47, 61) for index in range(4)]
    path = steady(tmp_path / "a.mkv", 4, frames=frames, codec="ffv1", pix_fmt="yuv444p")
    clip = read_clip(path, start=0, frames=4, fps=25, height=31, width=33)
    assert clip.shape == (4, 31, 33, 3) and numbers(clip) == [0, 1, 2, 3]


def test_reduction_does_not_alias(tmp_path):
    board = (np.indices((240, 240)).sum(0) % 2 * 255).astype(np.uint8)
    frames = [np.repeat(board[..., None], 3, 2)]
    path = steady(tmp_path / "a.mkv", 1, frames=frames, codec="ffv1", pix_fmt="yuv444p")
    small = read_clip(path, start=0, frames=1, fps=25, height=56, width=56)
    assert np.abs(small.astype(int) - 127).max() < 12


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50], [10, 10, 10]], np.uint8)


def test_colours_survive_writing_and_reading(tmp_path):
    frames = [np.broadcast_to(colour, (32, 32, 3)) for colour in COLOURS]
    write_video(tmp_path / "a.mp4", frames, 5)
    clip = read_clip(tmp_path / "a.mp4", start=0, frames=5, fps=5, height=32, width=32)
    assert np.abs(clip[:, 16, 16].astype(int) - COLOURS).max() <= 6


@pytest.mark.parametrize(("size", "matrix"), [(64, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_video_is_read_as_players_do(tmp_path, size, matrix):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv444p"
        pixels = np.broadcast_to(COLOURS[3], (size, size, 3)).copy()
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=matrix)))
        container.mux(stream.encode(None))
    clip = read_clip(path, start=0, frames=1, fps=5, height=size, width=size)
    assert np.abs(clip[0, 5, 5].astype(int) - COLOURS[3]).max() <= 2


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
    """The header, in front of a streaming mp4, still promises all 60 frames."""
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


def test_written_video_reads_back(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    write_video(path, (painted(index, 33, 49) for index in range(20)), 16)
    assert probe(path) == VideoInfo(fps=16.0, duration=1.25, width=48, height=32)
    assert clip_count_frames(path, 16) == 20
    clip = read_clip(path, start=0, frames=20, fps=16, height=32, width=48)
    assert numbers(clip) == list(range(20))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is all there


def test_writing_streams(tmp_path):
    alive: list[weakref.ref] = []

    def frames():
        for index in range(40):
            pixels = painted(index)
            alive.append(weakref.ref(pixels))
            assert sum(reference() is not None for reference in alive) <= 4
            yield pixels

    write_video(tmp_path / "a.mp4", frames(), 16)
    assert len(alive) == 40


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, [painted(0)] * 3, 16)
    before = path.read_bytes()

    def broken():
        yield painted(1)
        raise RuntimeError("the sampler failed")

    with pytest.raises(RuntimeError, match="the sampler failed"):
        write_video(path, broken(), 16)
    for frames in ([], [painted(0), painted(0, 32)], [painted(0) / 255], [painted(0)[..., 0]]):
        with pytest.raises(ValueError, match=r"a\.mp4: "):
            write_video(path, frames, 16)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_grey_and_transparent_video_become_rgb(tmp_path):
    grey = [painted(index) for index in range(4)]
    path = steady(tmp_path / "grey.mkv", 4, frames=grey, codec="ffv1", pix_fmt="gray")
    assert numbers(read_clip(path, start=0, frames=4, fps=25, **SMALL)) == [0, 1, 2, 3]
    alpha = steady(tmp_path / "alpha.mkv", 4, frames=grey, codec="ffv1", pix_fmt="yuva420p")
    clip = read_clip(alpha, start=0, frames=4, fps=25, **SMALL)
    assert clip.shape == (4, 48, 64, 3) and numbers(clip) == [0, 1, 2, 3]


def pq(light: float) -> float:
    """SMPTE ST 2084: the code, 0 to 1, of so many cd/m2."""
    y = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(scene: float) -> float:
    """ARIB STD-B67: the code, 0 to 1, of a scene's light, 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return (3 * scene) ** 0.5 if scene <= 1 / 12 else a * np.log(12 * scene - b) + c


@pytest.mark.parametrize(
    ("transfer", "codes"),
    [
        (16, [pq(light) for light in (0, 1, 20, 203, 1000, 4000)]),
        (18, [hlg(scene) for scene in (0, 0.001, 0.05, 0.26, 1.0, 1.0)]),
    ],
)
def test_hdr_is_brought_to_the_range_of_other_video(tmp_path, transfer, codes):
    """Greys stay grey and in order, diffuse white (203 cd/m2, 75 % of HLG) near white; without
    this, PQ's would be at 58 %, 148."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        for code in codes:
            planes = np.full((72, 64), 512, np.uint16)
            planes[:48] = round(64 + 876 * code)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p10le")
            frame.color_trc = transfer
            frame.colorspace = 9
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_clip(path, start=0, frames=len(codes), fps=25, **SMALL)
    greys = clip[:, 24, 32].astype(int)
    assert np.ptp(greys, axis=1).max() <= 2
    levels = greys[:, 1].tolist()
    assert levels == sorted(levels) and levels[0] <= 2
    assert 205 <= levels[3] <= 245 and levels[4] >= 250
