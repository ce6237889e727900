"""A decoded frame: turned upright, brought to a size and converted to RGB."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from . import hdr
from .shots import HEIGHT, WIDTH

# swscale's bicubic filters widen with the reduction, so a reduced picture does not alias.
SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
UNSPECIFIED = 2  # colorspace, primaries and transfer, as H.273 numbers them


@dataclass(frozen=True, eq=False)
class Picture:
    """Holds a decoded frame together with what its stream says about it.

    rate: average frame rate of the stream. pixel_aspect: width / height of a pixel.
    stated_duration: length of the stream in seconds according to its header.
    """

    frame: av.VideoFrame
    rate: Fraction
    pixel_aspect: float
    stated_duration: float

    @property
    def duration(self) -> float:
        """Return how long the container shows this frame, in seconds; 0 if it does not say."""
        frame = self.frame
        return float((frame.duration or 0) * (frame.time_base or 0))

    @property
    def turns(self) -> int:
        """Return how many counterclockwise quarter turns make the picture upright."""
        return round(self.frame.rotation / 90) % 4

    @property
    def upright_size(self) -> tuple[int, int]:
        """Return height and width of the upright picture with square pixels."""
        height, width = self.frame.height, round(self.frame.width * self.pixel_aspect)
        return (width, height) if self.turns % 2 else (height, width)

    def small(self, scaler: VideoReformatter) -> np.ndarray:
        """Return uint8 YUV `[HEIGHT, WIDTH, 3]`, the input of the cut detector."""
        frame = scaler.reformat(
            self.frame,
            width=WIDTH,
            height=HEIGHT,
            format="yuv444p",
            interpolation=Interpolation.AREA,
        )
        return frame.to_ndarray().transpose(1, 2, 0)

    def pixels(self, scaler: VideoReformatter, height: int, width: int) -> np.ndarray:
        """Return uint8 RGB `[height, width, 3]`, resized to cover and cropped at the centre.

        Grey becomes RGB, alpha is dropped, and HDR is tone-mapped to standard dynamic range.
        """
        if self.turns % 2:
            height, width = width, height
        frame, square_width = self.frame, self.frame.width * self.pixel_aspect
        scale = max(height / frame.height, width / square_width)
        cover_height = max(height, round(frame.height * scale))
        cover_width = max(width, round(square_width * scale))
        is_hdr = frame.color_trc in hdr.TRANSFERS
        cover = scaler.reformat(
            frame,
            width=cover_width,
            height=cover_height,
            format="rgb48le" if is_hdr else "rgb24",
            src_colorspace=_colorspace(frame),
            interpolation=SCALING,
        ).to_ndarray()
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        picture = cover[top : top + height, left : left + width]
        if is_hdr:
            picture = hdr.tone_map(picture, frame.color_trc)
        return np.rot90(picture, self.turns)


def _colorspace(frame: av.VideoFrame) -> int:
    """Return the tagged colorspace; untagged video is BT.709 from 720 rows up and BT.601 below.

    Players make the same guess.
    """
    if frame.colorspace != UNSPECIFIED:
        return frame.colorspace
    return Colorspace.ITU709 if min(frame.height, frame.width) >= 720 else Colorspace.ITU601
