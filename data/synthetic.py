"""Draw videos whose long-range coherence can be measured, from a seed, at any length and size.

In each set something must stay the same, or continue, for longer than a model's native length, and
`coherence.measure` finds out from a clip alone whether it did. Captions name what happens, never
what a clip must remember: its colour, shape, direction or scene.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .files import replacing
from .scenes import COLOURS, POINTER, SHAPES, Bar, Panorama, Scene, Sprite

SCHEMA = 1  # increase it with every change of what the clips show
RADIUS, HAND = 0.16, 0.42  # size of an object and of the hand, in shorter sides of the picture
GAP = 1.2  # native lengths for which `occlude` shows nothing
MAX_GAP = 0.6  # largest share of the clip that the gap may take, for short clips
PERIOD = 1.5  # native lengths per turn of `spin`: no clip of native length shows a whole turn
SPEEDS = (0.6, 1.4)  # range of crossings of the arena per native length, along each axis
PAN_SPEED = 1.7  # shorter sides of the picture that `pan` moves per native length


@dataclass(frozen=True)
class Arena:
    """Holds the size and length of a clip, in pixels and frames.

    native: the base model's native length in frames, the unit of gaps, periods and speeds; `frames`
    may exceed it. Raises ValueError for fewer than 8 frames or 24 pixels.
    """

    frames: int
    height: int
    width: int
    native: int

    def __post_init__(self) -> None:
        if self.frames < 8 or self.native < 8:
            raise ValueError(
                f"synthetic clips of {self.frames} frames at a native length of {self.native}: "
                "nothing lasts long enough in fewer than 8 frames."
            )
        if min(self.height, self.width) < 24:
            raise ValueError(
                f"synthetic clips of {self.height} x {self.width}: height and width must be at "
                "least 24 pixels, or objects cannot be told apart."
            )

    @property
    def side(self) -> int:
        """Return the shorter side of the picture in pixels."""
        return min(self.height, self.width)

    @property
    def radius(self) -> float:
        """Return the radius of an object in pixels."""
        return RADIUS * self.side

    @property
    def room(self) -> np.ndarray:
        """Return how far an object's centre can move along x and y, in pixels."""
        return np.array([self.width, self.height]) - 2 * self.radius


def visible_frames(name: str, arena: Arena) -> np.ndarray:
    """Return in which frames of a set its object must be visible, bool `[T]`."""
    visible = np.ones(arena.frames, bool)
    if name == "occlude":
        gap = round(min(GAP * arena.native, MAX_GAP * arena.frames))
        first = (arena.frames - gap) // 2
        visible[first : first + gap] = False
    elif name == "cross":
        each = min(arena.native // 2, arena.frames // 4)
        visible[each : arena.frames - each] = False
    return visible


def period(native: int) -> float:
    """Return the frames that one turn of `spin`'s hand takes."""
    return PERIOD * native


def folded(position: np.ndarray, length: np.ndarray | float) -> np.ndarray:
    """Reflect `position` at 0 and `length`: where something is that bounces between the two."""
    position = np.mod(position, 2 * length)
    return np.where(position < length, position, 2 * length - position)


def bounce(random: np.random.Generator, arena: Arena) -> Sprite:
    """Draw an object that flies in straight lines and bounces off the edges."""
    start = random.uniform(0, 2 * arena.room)
    speed = random.uniform(*SPEEDS, 2) * arena.room / arena.native * random.choice([-1, 1], 2)
    path = folded(start + speed * np.arange(arena.frames)[:, None], arena.room) + arena.radius
    return _object(random, arena, path, visible_frames("bounce", arena))


def occlude(random: np.random.Generator, arena: Arena) -> Sprite:
    """Draw `bounce`, with the object invisible for longer than the native length."""
    return replace(bounce(random, arena), visible=visible_frames("occlude", arena))


def cross(random: np.random.Generator, arena: Arena) -> Sprite:
    """Draw an object that bobs at the left, disappears, and then bobs at the right."""
    start = random.uniform(0, 2 * arena.room[1])
    speed = random.uniform(*SPEEDS) * arena.room[1] / arena.native * random.choice([-1, 1])
    y = folded(start + speed * np.arange(arena.frames), arena.room[1]) + arena.radius
    late = np.arange(arena.frames) >= arena.frames // 2
    x = np.where(late, arena.width - 1.25 * arena.radius, 1.25 * arena.radius)
    return _object(random, arena, np.stack([x, y], 1), visible_frames("cross", arena))


def spin(random: np.random.Generator, arena: Arena) -> Sprite:
    """Draw a hand that turns steadily around the centre."""
    centre = np.array([arena.width / 2 - 0.5, arena.height / 2 - 0.5])
    path = np.repeat(centre[None], arena.frames, 0)
    turn = 2 * np.pi / period(arena.native) * random.choice([-1, 1])
    angle = random.uniform(0, 2 * np.pi) + turn * np.arange(arena.frames)
    hand = _object(random, arena, path, visible_frames("spin", arena))
    shape = np.full(arena.frames, POINTER)
    return replace(hand, angle=angle, shape=shape, radius=HAND * arena.side)


def pan(random: np.random.Generator, arena: Arena) -> Panorama:
    """Draw a still scene that the camera moves over and, from the middle on, all the way back."""
    turn = np.minimum(np.arange(arena.frames), np.arange(arena.frames)[::-1])
    left = turn * PAN_SPEED * arena.side / arena.native
    wide = arena.width + int(np.ceil(left.max())) + 2
    return Panorama(_landscape(random, arena.height, wide, arena.side / 4), arena.width, left)


def clock(random: np.random.Generator, arena: Arena) -> Bar:
    """Draw a bar that grows steadily from nothing to the whole width, however long the clip is."""
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
class ClipSet:
    """Draws clips by number: clip i of a set and seed is the same whatever else is drawn.

    name: a key of SETS, or `mix`, which takes the sets in turn. Raises ValueError for another name.
    """

    name: str
    arena: Arena
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)

    def set_of(self, index: int) -> str:
        """Return the name of the set that clip `index` belongs to."""
        return list(SETS)[index % len(SETS)] if self.name == "mix" else self.name

    def scene(self, index: int) -> Scene:
        """Return the scene of clip `index`, not yet drawn."""
        name = self.set_of(index)
        number = list(SETS).index(name)
        return SETS[name](np.random.default_rng((self.seed, number, index)), self.arena)

    def clip(self, index: int) -> np.ndarray:
        """Return clip `index` as uint8 RGB `[T, H, W, 3]`."""
        return self.scene(index).render()

    def caption(self, index: int) -> str:
        """Return the caption of clip `index`.

        It is drawn independently of the scene, so it reveals nothing but the set.
        """
        choices = CAPTIONS[self.set_of(index)]
        return choices[int(np.random.default_rng((self.seed, index)).integers(len(choices)))]


def check_name(name: str) -> None:
    """Raise ValueError, naming the sets, if there is no set `name`."""
    if name != "mix" and name not in SETS:
        raise ValueError(
            f"synthetic:{name} is not a set of clips: choose one of {', '.join(SETS)}, "
            "or mix for all in turn."
        )


def write_folder(clip_set: ClipSet, clips: int, fps: float, parent: Path) -> Path:
    """Write the first `clips` clips as mp4 files with captions to a folder in `parent`; return it.

    The folder's name holds every setting of the clips. A complete folder is used as it is, and an
    interrupted one is continued: `metadata.jsonl` is written last.
    """
    from .write_video import write_video

    a = clip_set.arena
    size = f"{a.frames}x{a.height}x{a.width}"
    name = f"{clip_set.name}-{size}-native{a.native}-{fps:g}fps-seed{clip_set.seed}-v{SCHEMA}"
    folder = parent / f"{name}-{clips}"
    if (folder / "metadata.jsonl").is_file():
        return folder
    rows = []
    for index in range(clips):
        file = f"{clip_set.set_of(index)}-{index:05d}.mp4"
        if not (folder / file).is_file():
            write_video(folder / file, clip_set.clip(index), fps)
        rows.append(json.dumps({"file_name": file, "caption": clip_set.caption(index)}))
    with replacing(folder / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _object(
    random: np.random.Generator, arena: Arena, path: np.ndarray, visible: np.ndarray
) -> Sprite:
    """Draw one object of one colour and shape on a path `[T, 2]`."""
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
    """Return random colours on a grid of `cell` pixels, interpolated to `[H, W, 3]`."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    points = random.uniform(0, 1, (rows, columns, 3)).astype(np.float32)
    y, x = np.arange(height) / cell, np.arange(width) / cell
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None, None], (x - left)[None, :, None]
    above = points[top][:, left] * (1 - right) + points[top][:, left + 1] * right
    below = points[top + 1][:, left] * (1 - right) + points[top + 1][:, left + 1] * right
    return above * (1 - down) + below * down
