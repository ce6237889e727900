"""A frame is turned upright, resized, cropped and converted to RGB."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from videos import numbers, painted, steady

from longreel.data.decode import VideoInfo, probe, read_clip

SMALL = {"height": 48, "width": 64}
COLOUR = np.array([200, 100, 50], np.uint8)


def quadrants(height: int, width: int) -> np.ndarray:
    """Draw red and green above blue and white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255, 0, 0
    pixels[: height // 2, width // 2 :] = 0, 255, 0
    pixels[height // 2 :, : width // 2] = 0, 0, 255
    pixels[height // 2 :, width // 2 :] = 255
    return pixels


def corners(frame: np.ndarray) -> str:
    """Return the initials of the colours in `frame`'s corners, row by row."""
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


@pytest.mark.parametrize(("size", "matrix"), [(64, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_video_is_read_as_players_do(tmp_path, size, matrix):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv444p"
        pixels = np.broadcast_to(COLOUR, (size, size, 3)).copy()
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=matrix)))
        container.mux(stream.encode(None))
    clip = read_clip(path, start=0, frames=1, fps=5, height=size, width=size)
    assert np.abs(clip[0, 5, 5].astype(int) - COLOUR).max() <= 2


def test_grey_and_transparent_video_become_rgb(tmp_path):
    grey = [painted(index) for index in range(4)]
    path = steady(tmp_path / "grey.mkv", 4, frames=grey, codec="ffv1", pix_fmt="gray")
    assert numbers(read_clip(path, start=0, frames=4, fps=25, **SMALL)) == [0, 1, 2, 3]
    alpha = steady(tmp_path / "alpha.mkv", 4, frames=grey, codec="ffv1", pix_fmt="yuva420p")
    clip = read_clip(alpha, start=0, frames=4, fps=25, **SMALL)
    assert clip.shape == (4, 48, 64, 3) and numbers(clip) == [0, 1, 2, 3]


def pq(light: float) -> float:
    """Return the code, 0 to 1, of light in cd/m2 (SMPTE ST 2084)."""
    y = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(scene: float) -> float:
    """Return the code, 0 to 1, of scene light, 0 to 1 (ARIB STD-B67)."""
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
    """Greys stay grey and in order, and diffuse white (203 cd/m2, 75 % of HLG) stays near white.

    Without tone mapping, PQ's diffuse white would come out at 58 %, level 148.
    """
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
