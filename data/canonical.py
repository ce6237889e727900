"""One form for every source: H.264 of constant frame rate, a key frame a second, no B-frames.

Other programs number the frames of files as found differently (by an edit list, by B-frames in AVI,
by headers that lie); of these copies they agree on every one. Frame i is what the video shows
i / fps seconds in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter

from .decode import DecodeError, shown, write_video


def write_canonical(source: Path, target: Path, fps: float) -> str:
    """Writes what can be decoded of `source`, upright and with square pixels; returns what is wrong
    with the rest of it, empty if nothing. No frame, no file."""
    fault = ""

    def frames() -> Iterator[np.ndarray]:
        nonlocal fault
        scaler = VideoReformatter()
        latest, pixels = None, np.empty(0)
        try:
            for picture in shown(source, fps):
                if picture is not latest:
                    latest, pixels = picture, picture.pixels(scaler, *picture.upright_size)
                yield pixels
        except DecodeError as error:
            fault = error.reason

    pictures = frames()
    first = next(pictures, None)
    if first is not None:

        def whole() -> Iterator[np.ndarray]:
            yield first
            yield from pictures

        gop = str(max(1, round(fps)))
        options = {"crf": "12", "g": gop, "bf": "0", "x264-params": "open-gop=0"}
        write_video(target, whole(), fps, options=options)
    return fault
