"""Make small videos whose frames encode their own number, and predict which frame is on display."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from longreel.data.write_video import write_video

STEP, DARKEST = 4, 18  # grey levels; far enough apart to survive lossy codecs


def painted(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [height, width, 3] whose grey level encodes `index` (0 to 55)."""
    return np.full((height, width, 3), DARKEST + STEP * index, np.uint8)


def numbers(clip: np.ndarray) -> list[int]:
    """Return the number that each frame of `clip` [F, H, W, 3] encodes."""
    return [round((float(frame.mean()) - DARKEST) / STEP) for frame in clip]


def make_video(
    path: Path,
    times: Sequence[int],
    *,
    per_second: int = 1000,
    frames: Sequence[np.ndarray] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Write a video whose frame i has the timestamp `times[i] / per_second`.

    frames: numbered ones if None. For codecs that need a constant frame rate, pass `range(n)` and
    that rate.
    """
    frames = [painted(index) for index in range(len(times))] if frames is None else frames
    height, width = frames[0].shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=per_second, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for time, pixels in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, per_second)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def steady(path: Path, num_frames: int, fps: int = 25, **options) -> Path:
    """Write a numbered video of constant frame rate."""
    return make_video(path, range(num_frames), per_second=fps, **options)


def on_show(seconds: Sequence[float], fps: float, num_frames: int, start: int = 0) -> list[int]:
    """Return the frames on display at (start + i) / fps seconds; `seconds` are their timestamps."""
    wanted = [(start + i) / fps + 1e-3 for i in range(num_frames)]
    return [max(k for k, s in enumerate(seconds) if s - seconds[0] <= t) for t in wanted]


def noise(num_frames: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """Return frames that do not compress, so that every frame takes space in the file."""
    generator = np.random.default_rng(0)
    return list(generator.integers(0, 256, (num_frames, height, width, 3), np.uint8))


def gaps(seconds: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(seconds)]


def write_waves(folder: Path, count: int, frames: int, height: int, width: int, fps: int) -> Path:
    """Write `count` videos of moving waves, with captions."""
    y, x = np.mgrid[:height, :width].astype(np.float32)

    def picture(index: int, t: int) -> np.ndarray:
        waves = [np.sin((x + t * (index + 1)) / (5 + index + c)) * np.cos(y / 7) for c in range(3)]
        return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)

    for index in range(count):
        pictures = (picture(index, t) for t in range(frames))
        write_video(folder / f"{index}.mp4", pictures, fps)
        (folder / f"{index}.txt").write_text(f"waves number {index}")
    return folder
