"""Draw the scenes that synthetic clips show: an object, a panorama or a bar, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Far apart from each other, so that the nearest one still identifies a blurred object.
COLOURS = np.array(
    [
        [0.90, 0.15, 0.15],
        [0.15, 0.75, 0.20],
        [0.20, 0.35, 0.95],
        [0.95, 0.85, 0.15],
        [0.85, 0.25, 0.85],
        [0.15, 0.85, 0.85],
    ],
    np.float32,
)
SHAPES = ("disc", "square", "plus", "triangle")
POINTER = len(SHAPES)  # the hand of `spin`, whose shape shows its direction
BACKGROUND = 0.12
LINES = (0.35, 0.65)  # first and last row of `clock`'s bar, in heights of the picture


class Scene(Protocol):
    """Draws the frames of a clip."""

    def render(self) -> np.ndarray:
        """Return uint8 RGB `[T, H, W, 3]`."""
        ...


@dataclass(frozen=True, eq=False)
class Sprite:
    """Shows one object on a plain background; every array has one entry per frame.

    radius: pixels. centre: `[T, 2]`, x and y in pixels. colour: index into COLOURS.
    shape: index into SHAPES, or POINTER. angle: radians, clockwise on the screen.
    visible: bool, True where the object is drawn.
    """

    height: int
    width: int
    radius: float
    centre: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    angle: np.ndarray
    visible: np.ndarray

    def render(self) -> np.ndarray:
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        out = np.empty((len(self.centre), self.height, self.width, 3), np.uint8)
        for t, (cx, cy) in enumerate(self.centre):
            cover = np.zeros_like(x)
            if self.visible[t]:
                distance = outline(self.shape[t], x - cx, y - cy, self.radius, self.angle[t])
                cover = np.clip(0.5 - distance, 0, 1)
            cover = cover[..., None]
            out[t] = to_uint8(BACKGROUND * (1 - cover) + COLOURS[self.colour[t]] * cover)
        return out


@dataclass(frozen=True, eq=False)
class Panorama:
    """Shows a window that slides over a still picture.

    picture: `[H, wide, 3]`, values in [0, 1]. width: of the window, in pixels.
    left: `[T]`, left edge of the window in pixels.
    """

    picture: np.ndarray
    width: int
    left: np.ndarray

    def render(self) -> np.ndarray:
        frames = []
        for left in np.clip(self.left, 0, self.picture.shape[1] - self.width - 1):
            first, part = int(left), left - int(left)
            window = self.picture[:, first : first + self.width + 1]
            frames.append(to_uint8(window[:, :-1] * (1 - part) + window[:, 1:] * part))
        return np.stack(frames)


@dataclass(frozen=True, eq=False)
class Bar:
    """Shows a bar of one colour that fills the share `filled[t]` of the width, from the left."""

    height: int
    width: int
    colour: int
    filled: np.ndarray

    def render(self) -> np.ndarray:
        columns = np.clip(self.filled[:, None] * self.width - np.arange(self.width), 0, 1)
        out = np.full((len(self.filled), self.height, self.width, 3), BACKGROUND, np.float32)
        first, last = (round(share * self.height) for share in LINES)
        cover = columns[:, None, :, None].astype(np.float32)
        out[:, first:last] = BACKGROUND * (1 - cover) + COLOURS[self.colour] * cover
        return to_uint8(out)


def outline(
    shape: int, x: np.ndarray, y: np.ndarray, radius: float, angle: float = 0.0
) -> np.ndarray:
    """Return the signed distance in pixels from the edge of a shape centred at 0, negative inside.

    shape: index into SHAPES, or POINTER. Every shape has its centre of gravity at 0 except the
    hand, whose centre of gravity shows its direction.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = cos * x + sin * y, cos * y - sin * x
    if shape == 0:
        return np.hypot(x, y) - radius
    if shape == 1:
        return np.maximum(abs(x), abs(y)) - 0.87 * radius
    if shape == 2:
        upright = np.maximum(abs(x) - 0.33 * radius, abs(y) - radius)
        return np.minimum(upright, np.maximum(abs(y) - 0.33 * radius, abs(x) - radius))
    if shape == 3:
        slopes = 0.866 * abs(x) - 0.5 * y
        return np.maximum(slopes, y) - 0.55 * radius
    assert shape == POINTER
    hub = np.hypot(x, y) - 0.3 * radius
    return np.minimum(hub, np.maximum(abs(x - radius / 2) - radius / 2, abs(y) - 0.18 * radius))


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to uint8."""
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
