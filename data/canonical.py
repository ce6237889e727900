"""Re-encode videos to one form: H.264 at a constant frame rate, a key frame a second, no B-frames.

Programs disagree on the frame numbers of files in the wild (edit lists, B-frames in AVI, wrong
headers). They agree on every frame of these copies: frame i is what the source video shows at
i / fps seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter

from .decode import DecodeError, resampled
from .write_video import write_video


def write_canonical(source: Path, target: Path, fps: float) -> str:
    """Write all of `source` that can be decoded, upright and with square pixels, to `target`.

    Returns what is wrong with the rest of `source`, empty if nothing. If no frame can be decoded,
    no file is written.
    """
    fault = ""

    def frames() -> Iterator[np.ndarray]:
        nonlocal fault
        scaler = VideoReformatter()
        latest, pixels = None, np.empty(0)
        try:
            for picture in resampled(source, fps):
                if picture is not latest:
                    latest, pixels = picture, picture.pixels(scaler, *picture.upright_size)
                yield pixels
        except DecodeError as error:
            fault = error.reason

    pictures = frames()
    first = next(pictures, None)
    if first is not None:
        gop = str(max(1, round(fps)))
        options = {"crf": "12", "g": gop, "bf": "0", "x264-params": "open-gop=0"}
        write_video(target, chain((first,), pictures), fps, options=options)
    return fault
