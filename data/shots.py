"""Find cuts by how much the picture changes from one frame to the next.

The rule is that of PySceneDetect's AdaptiveDetector: a frame begins a shot if it differs strongly
from the frame before it, and by far more than its neighbours do, so that fast motion is not taken
for a cut. Fades are not found.
"""

from __future__ import annotations

import numpy as np

HEIGHT, WIDTH = 36, 64  # size that frames are reduced to before they are compared
LEAST = 15.0  # smallest mean change of the three channels at a cut, in grey levels of 255
RATIO = 3.0  # smallest ratio of that change to the mean change of the neighbours
NEARBY = 2  # neighbours on either side


class CutDetector:
    """Collects frames, each once and in order, and returns the cuts between them."""

    def __init__(self) -> None:
        self._frames: list[int] = []
        self._changes: list[float] = []
        self._last: np.ndarray | None = None

    def add(self, index: int, picture: np.ndarray) -> None:
        """Add frame `index`. picture: `[HEIGHT, WIDTH, 3]`, luma and chroma, 0 to 255."""
        now = picture.astype(np.float32)
        if self._last is not None:
            self._frames.append(index)
            self._changes.append(float(np.abs(now - self._last).mean()))
        self._last = now

    def cuts(self) -> list[int]:
        """Return the frames that begin a shot, without the first frame of the video."""
        found = []
        for place, change in enumerate(self._changes):
            nearby = self._changes[max(0, place - NEARBY) : place]
            nearby += self._changes[place + 1 : place + 1 + NEARBY]
            usual = sum(nearby) / len(nearby) if nearby else 0.0
            if change >= LEAST and change >= RATIO * usual:
                found.append(self._frames[place])
        return found


def shots(frames: int, cuts: list[int]) -> list[range]:
    """Split the frames 0 ... `frames` - 1 at `cuts`."""
    edges = [0, *(cut for cut in cuts if cut < frames), frames]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]
