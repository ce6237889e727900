"""Cuts, found by how much the picture changes from one frame to the next.

As PySceneDetect's AdaptiveDetector decides: a frame begins a shot if it differs from the one before
by much, and by far more than its neighbours do, so that fast motion is no cut. Fades are not found.
"""

from __future__ import annotations

import numpy as np

HEIGHT, WIDTH = 36, 64  # what frames are reduced to
LEAST = 15.0  # mean change of the three channels, in grey levels of 255
RATIO = 3.0  # how many times the mean change nearby
NEARBY = 2  # frames on either side


class CutDetector:
    """Is shown each frame once, in order; `cuts` are the frames that begin a shot, but the first
    one."""

    def __init__(self) -> None:
        self._frames: list[int] = []
        self._changes: list[float] = []
        self._last: np.ndarray | None = None

    def see(self, index: int, picture: np.ndarray) -> None:
        """picture: [HEIGHT, WIDTH, 3], a luminance and two colours, 0 to 255."""
        now = picture.astype(np.float32)
        if self._last is not None:
            self._frames.append(index)
            self._changes.append(float(np.abs(now - self._last).mean()))
        self._last = now

    def cuts(self) -> list[int]:
        found = []
        for place, change in enumerate(self._changes):
            nearby = self._changes[max(0, place - NEARBY) : place]
            nearby += self._changes[place + 1 : place + 1 + NEARBY]
            usual = sum(nearby) / len(nearby) if nearby else 0.0
            if change >= LEAST and change >= RATIO * usual:
                found.append(self._frames[place])
        return found


def shots(frames: int, cuts: list[int]) -> list[range]:
    """The frames 0 ... `frames` - 1 from cut to cut."""
    edges = [0, *(cut for cut in cuts if cut < frames), frames]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]
