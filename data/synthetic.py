"""Videos whose long-range coherence can be measured: drawn from a seed, at any length and size.

Each set holds something that a clip must keep or go on with for longer than the native length of a
model, and `coherence.measure` tells from a clip alone whether it did. Captions name what happens,
never what a clip must remember: its colour, shape, direction or scene.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from .files import replacing

SCHEMA = 1  # raise it with any change of what the clips show

# Far apart in every channel's sense, so that a blurred object is still told by the nearest.
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
POINTER = len(SHAPES)  # the hand of `spin`, whose direction can be told
BACKGROUND = 0.12
RADIUS, HAND = 0.16, 0.42  # of an object and of the hand, in shorter sides of the picture
GAP = 1.2  # native lengths for which `occlude` shows nothing
GAP_MOST = 0.6  # of the clip, where it is short
PERIOD = 1.5  # native lengths that a turn of `spin` takes: never seen whole at the native length
SPEEDS = (0.6, 1.4)  # crossings of the arena in a native length, along each axis
PAN_SPEED = 1.7  # shorter sides that `pan` moves in a native length
LINES = (0.35, 0.65)  # rows of `clock`'s bar, in heights


class Scene(Protocol):
    """What a clip shows, frame by frame."""

    def render(self) -> np.ndarray:
        """uint8 RGB `[T, H, W, 3]`."""
        ...


@dataclass(frozen=True, eq=False)
class Sprite:
    """One object on a plain background; arrays have an entry a frame.

    centre: `[T, 2]` x and y in pixels. colour: index into COLOURS. shape: into SHAPES, or POINTER.
    angle: radians, clockwise on the screen. radius: pixels.
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
    """A window that slides over a still picture `[H, wide, 3]`; left: its edge in pixels, `[T]`."""

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
    """A bar of one colour that fills the share `filled[t]` of the width, from the left."""

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


@dataclass(frozen=True)
class Arena:
    """Size and length of a clip. native: frames of the base model's clips, which gaps, periods and
    speeds are measured in; `frames` may be more."""

    frames: int
    height: int
    width: int
    native: int

    def __post_init__(self) -> None:
        if self.frames < 8 or self.native < 8:
            raise ValueError(
                f"synthetic clips of {self.frames} frames at a native length of {self.native}: "
                "nothing lasts long enough in fewer than 8."
            )
        if min(self.height, self.width) < 24:
            raise ValueError(
                f"synthetic clips of {self.height} x {self.width}: objects cannot be told apart "
                "below 24 pixels."
            )

    @property
    def side(self) -> int:
        return min(self.height, self.width)

    @property
    def radius(self) -> float:
        return RADIUS * self.side

    @property
    def room(self) -> np.ndarray:
        """Pixels that an object's centre can move along x and y."""
        return np.array([self.width, self.height]) - 2 * self.radius


def shown(name: str, arena: Arena) -> np.ndarray:
    """Frames of a set in which its object is to be seen, bool `[T]`."""
    visible = np.ones(arena.frames, bool)
    if name == "occlude":
        gap = round(min(GAP * arena.native, GAP_MOST * arena.frames))
        first = (arena.frames - gap) // 2
        visible[first : first + gap] = False
    elif name == "cross":
        each = min(arena.native // 2, arena.frames // 4)
        visible[each : arena.frames - each] = False
    return visible


def period(native: int) -> float:
    """Frames in which the hand of `spin` turns once."""
    return PERIOD * native


def folded(position: np.ndarray, length: np.ndarray | float) -> np.ndarray:
    """Where something is that started at 0 and is thrown back at 0 and `length`."""
    position = np.mod(position, 2 * length)
    return np.where(position < length, position, 2 * length - position)


def bounce(random: np.random.Generator, arena: Arena) -> Sprite:
    """An object crosses the picture in straight lines and is thrown back at the edges."""
    start = random.uniform(0, 2 * arena.room)
    speed = random.uniform(*SPEEDS, 2) * arena.room / arena.native * random.choice([-1, 1], 2)
    path = folded(start + speed * np.arange(arena.frames)[:, None], arena.room) + arena.radius
    return _object(random, arena, path, shown("bounce", arena))


def occlude(random: np.random.Generator, arena: Arena) -> Sprite:
    """The same, but for longer than the native length nothing is to be seen of it."""
    return replace(bounce(random, arena), visible=shown("occlude", arena))


def cross(random: np.random.Generator, arena: Arena) -> Sprite:
    """An object bobs at the left, nothing is to be seen, then the same object bobs at the right."""
    start = random.uniform(0, 2 * arena.room[1])
    speed = random.uniform(*SPEEDS) * arena.room[1] / arena.native * random.choice([-1, 1])
    y = folded(start + speed * np.arange(arena.frames), arena.room[1]) + arena.radius
    late = np.arange(arena.frames) >= arena.frames // 2
    x = np.where(late, arena.width - 1.25 * arena.radius, 1.25 * arena.radius)
    return _object(random, arena, np.stack([x, y], 1), shown("cross", arena))


def spin(random: np.random.Generator, arena: Arena) -> Sprite:
    """A hand turns steadily about the centre."""
    centre = np.array([arena.width / 2 - 0.5, arena.height / 2 - 0.5])
    path = np.repeat(centre[None], arena.frames, 0)
    turn = 2 * np.pi / period(arena.native) * random.choice([-1, 1])
    angle = random.uniform(0, 2 * np.pi) + turn * np.arange(arena.frames)
    hand = _object(random, arena, path, shown("spin", arena))
    shape = np.full(arena.frames, POINTER)
    return replace(hand, angle=angle, shape=shape, radius=HAND * arena.side)


def pan(random: np.random.Generator, arena: Arena) -> Panorama:
    """The camera moves over a still scene and, from the middle on, all the way back."""
    turn = np.minimum(np.arange(arena.frames), np.arange(arena.frames)[::-1])
    left = turn * PAN_SPEED * arena.side / arena.native
    wide = arena.width + int(np.ceil(left.max())) + 2
    return Panorama(_landscape(random, arena.height, wide, arena.side / 4), arena.width, left)


def clock(random: np.random.Generator, arena: Arena) -> Bar:
    """A bar grows steadily from nothing to the whole width over the clip, however long that is."""
    colour = int(random.integers(len(COLOURS)))
    return Bar(
        arena.height, arena.width, colour, np.arange(1, arena.frames + 1) / (arena.frames + 1)
    )


SETS: dict[str, Callable[[np.random.Generator, Arena], Scene]] = {
    "bounce": bounce,
    "occlude": occlude,
    "cross": cross,
    "spin": spin,
    "pan": pan,
    "clock": clock,
}

CAPTIONS = {
    "bounce": ("an object bounces around in a box", "something flies about and hits the walls"),
    "occlude": ("an object goes out of sight and returns", "something bounces, hides and is back"),
    "cross": ("an object at one side, later at the other", "something vanishes and reappears"),
    "spin": ("a hand turns around its centre", "a pointer that keeps turning"),
    "pan": ("the camera moves over a scene and back", "a slow pan out and back again"),
    "clock": ("a bar fills over the whole clip", "a progress bar runs from empty to full"),
}


@dataclass(frozen=True)
class Source:
    """Clips by number: clip i of a set and seed is the same whatever else is drawn.

    name: of SETS, or `mix`, which takes the sets in turn.
    """

    name: str
    arena: Arena
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)

    def set_of(self, index: int) -> str:
        """The set that clip `index` is of."""
        return list(SETS)[index % len(SETS)] if self.name == "mix" else self.name

    def scene(self, index: int) -> Scene:
        name = self.set_of(index)
        number = list(SETS).index(name)
        return SETS[name](np.random.default_rng((self.seed, number, index)), self.arena)

    def clip(self, index: int) -> np.ndarray:
        """uint8 RGB `[T, H, W, 3]`."""
        return self.scene(index).render()

    def caption(self, index: int) -> str:
        """Drawn apart from the scene, so that it tells nothing of it but the set."""
        choices = CAPTIONS[self.set_of(index)]
        return choices[int(np.random.default_rng((self.seed, index)).integers(len(choices)))]


def check_name(name: str) -> None:
    """Raise ValueError, naming the sets, for one that does not exist."""
    if name != "mix" and name not in SETS:
        raise ValueError(
            f"synthetic:{name} is no set of clips. Sets: {', '.join(SETS)}, or mix for all in turn."
        )


def write_folder(source: Source, clips: int, fps: float, parent: Path) -> Path:
    """The first `clips` clips as a folder of mp4 files with captions, made where it is missing.

    Its name tells all that shaped it, and `metadata.jsonl` comes last: a folder that was
    interrupted goes on with the clips that it lacks.
    """
    from .decode import write_video

    a = source.arena
    size = f"{a.frames}x{a.height}x{a.width}"
    name = f"{source.name}-{size}-native{a.native}-{fps:g}fps-seed{source.seed}-v{SCHEMA}"
    folder = parent / f"{name}-{clips}"
    if (folder / "metadata.jsonl").is_file():
        return folder
    rows = []
    for index in range(clips):
        file = f"{source.set_of(index)}-{index:05d}.mp4"
        if not (folder / file).is_file():
            write_video(folder / file, source.clip(index), fps)
        rows.append(json.dumps({"file_name": file, "caption": source.caption(index)}))
    with replacing(folder / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def outline(
    shape: int, x: np.ndarray, y: np.ndarray, radius: float, angle: float = 0.0
) -> np.ndarray:
    """Signed distance in pixels from the edge of a shape centred at 0, below 0 inside.

    Each has its centre of gravity at 0, but for the hand's, whose direction it tells.
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
    """Of values in [0, 1]."""
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _object(
    random: np.random.Generator, arena: Arena, path: np.ndarray, visible: np.ndarray
) -> Sprite:
    """One object of one colour and shape on a path `[T, 2]`."""
    colour, shape = random.integers(len(COLOURS)), random.integers(len(SHAPES))
    return Sprite(
        height=arena.height,
        width=arena.width,
        radius=arena.radius,
        centre=path,
        colour=np.full(arena.frames, colour),
        shape=np.full(arena.frames, shape),
        angle=np.zeros(arena.frames),
        visible=visible,
    )


def _landscape(random: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Random colours on a grid of `cell` pixels, blended between its points: `[H, W, 3]`."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    points = random.uniform(0, 1, (rows, columns, 3)).astype(np.float32)
    y, x = np.arange(height) / cell, np.arange(width) / cell
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    above = points[top][:, left] * (1 - right) + points[top][:, left + 1] * right
    below = points[top + 1][:, left] * (1 - right) + points[top + 1][:, left + 1] * right
    return above * (1 - down) + below * down
