"""Write RGB frames as an H.264 mp4 through PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from .files import replacing
from .picture import SCALING

BT709 = 1  # colorspace, primaries and transfer, as H.273 numbers them
LIMITED = 1  # libav's color_range: 16 to 235


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float,
    options: dict[str, str] | None = None,
) -> None:
    """Write uint8 RGB frames `[height, width, 3]` as an H.264 (BT.709 4:2:0, faststart) mp4.

    Frames are encoded one by one as they arrive. 4:2:0 needs even sizes, so an odd last row or
    column is cut. options: libx264 options; the default is crf 17. The file appears only when it is
    complete. Raises ValueError if there is no frame or the frames differ in shape or dtype.
    """
    path, rate = Path(path), Fraction(fps).limit_denominator(1001)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: there is no frame to write")
    if first.ndim != 3 or first.shape[2] != 3 or min(first.shape[:2]) < 2:
        raise ValueError(f"{path}: frames must be [height, width, 3], got {list(first.shape)}")
    height, width = (size // 2 * 2 for size in first.shape[:2])
    with (
        replacing(path) as temporary,
        av.open(
            str(temporary.absolute()), "w", format="mp4", options={"movflags": "+faststart"}
        ) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options=options or {"crf": "17"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        scaler = VideoReformatter()
        for index, pixels in enumerate(chain((first,), frames)):
            if pixels.shape != first.shape or pixels.dtype != np.uint8:
                raise ValueError(
                    f"{path}: frame {index} is {pixels.dtype} {list(pixels.shape)}, "
                    f"uint8 {list(first.shape)} is needed"
                )
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels[:height, :width]), format="rgb24"
            )
            frame = scaler.reformat(
                frame,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=LIMITED,
                interpolation=SCALING,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
