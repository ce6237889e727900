"""Measure how coherent a clip of a synthetic set is over time, from the clip alone.

Nothing is learned and no ground truth is needed: the properties that all clips of a set share
(`synthetic.SETS`) are enough. Colours range from 0 to 1. Lengths are in shorter sides of the
picture, so that clips of different sizes compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, LINES, SHAPES, outline
from .synthetic import HAND, SPEEDS, Arena, check_name, folded, period, visible_frames

CONTRAST = 0.18  # least difference of an object from the background, in any channel
AREA = (0.25, 2.5)  # area of one whole object, in discs of the object's radius
CHANGED = 0.1  # least difference of a pixel that moved, in any channel
LAGS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # lags of `agree@N`, in native lengths
BEST_PSNR = 60.0  # dB, given to equal frames
OBJECTS = ("bounce", "occlude", "cross", "spin")


@dataclass(frozen=True, eq=False)
class Track:
    """Holds what is seen of one object in each frame; NaN or -1 where `seen` is false.

    seen: bool `[T]`. centre: `[T, 2]`, x and y of the centre of gravity in pixels. colour: index of
    the nearest of COLOURS. shape: index of the nearest of SHAPES; -1 for a hand.
    """

    seen: np.ndarray
    centre: np.ndarray
    colour: np.ndarray
    shape: np.ndarray


def measure(name: str, clip: np.ndarray, native: int) -> dict[str, float]:
    """Compute all figures of a set for a clip, uint8 `[T, H, W, 3]`.

    A figure is NaN where the clip gives no answer, such as the identity of an object that is never
    seen. native: the native length that the set was drawn with, in frames.

    All sets:
        flicker: how much brightness jumps between frames, in grey levels of 255.
        drift: how far the background's colour moves from the first tenth of the clip to the last;
            not for `pan`, which has no background.
        motion: share of pixels that change within a fifth of a native length; 0 for a frozen clip.
    Sets with an object that must keep its identity:
        visible: of the frames that should show the object, the share that does.
        ghosts: of the frames that should show none, the share that shows one.
        agree@N: of the frame pairs N apart that both show an object, the share with the same
            colour; chance is 1/6.
        switches: number of colour changes from one sighting to the next.
        same_shape: share of sightings that have the most frequent shape; not for `spin`.
        ends: 1 if the first and the last sightings have the same colour, else 0.
    `bounce` and `occlude`:
        trajectory_rmse: distance from the best path of constant speed that is straight between
            bounces off the walls.
    `spin`:
        angular_speed_error: mean relative error of the speed.
    `pan`:
        loop_near, loop_far: PSNR in dB of frames that show the same place on the way out and on the
            way back, next to the turn and at the ends of the clip.
        loop_gap: far minus near. It is negative if the scene was forgotten; blur and noise change
            both terms.
    `clock`:
        clock_error: mean distance of the bar's end from where it should be, in widths.
        backwards: share of frames in which the bar shrinks.

    Raises ValueError for an unknown set, for a clip of another shape or dtype, and for one below
    the smallest sizes of `Arena`.
    """
    check_name(name)
    if name == "mix" or clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
        raise ValueError(
            f"{name} clip {clip.dtype} {list(clip.shape)}: give a clip of one set, uint8 "
            "[frames, height, width, 3]"
        )
    frames, height, width, _ = clip.shape
    arena = Arena(frames, height, width, native)
    pixels = clip.astype(np.float32) / 255
    ground = np.median(pixels.reshape(len(pixels), -1, 3), 1)  # objects cover less than half
    found = {
        "flicker": flicker(ground),
        "motion": motion(pixels, ground, max(native // 5, 1)),
    }
    if name != "pan":
        found["drift"] = drift(ground)
    if name in OBJECTS:
        seen = track(pixels, ground, arena, hand=name == "spin")
        found |= _presence(seen, visible_frames(name, arena)) | _identity(seen, native)
        if name in ("bounce", "occlude"):
            found["trajectory_rmse"] = trajectory_rmse(seen, arena)
        if name == "spin":
            found["angular_speed_error"] = angular_speed_error(seen, arena)
        else:
            found["same_shape"] = _same_shape(seen)
    if name == "pan":
        near, far = loop_psnr(pixels)
        found |= {"loop_near": near, "loop_far": far, "loop_gap": far - near}
    if name == "clock":
        found |= clock_errors(pixels, ground)
    return found


def flicker(ground: np.ndarray) -> float:
    """Return the median second difference of the brightness of background colours `[T, 3]`.

    Steady change has none. The unit is grey levels of 255.
    """
    brightness = ground.mean(1)
    return float(np.median(np.abs(np.diff(brightness, 2)))) * 255


def drift(ground: np.ndarray) -> float:
    """Return how far background colours `[T, 3]` moved, in the channel that moved most."""
    part = max(len(ground) // 10, 1)
    return float(np.abs(ground[-part:].mean(0) - ground[:part].mean(0)).max())


def motion(pixels: np.ndarray, ground: np.ndarray, lag: int) -> float:
    """Return the share of pixels that changed over `lag` frames, ignoring overall brightness."""
    level = pixels - ground[:, None, None]
    return float((np.abs(level[lag:] - level[:-lag]).max(-1) > CHANGED).mean())


def track(pixels: np.ndarray, ground: np.ndarray, arena: Arena, *, hand: bool) -> Track:
    """Find the object in each frame: pixels that stand out, if their number fits its size.

    pixels: `[T, H, W, 3]` in [0, 1]. ground: background colours `[T, 3]`. hand: look for the hand
    of `spin` instead of a shape.
    """
    frames = len(pixels)
    radius = HAND * arena.side / 2 if hand else arena.radius
    contrast = np.abs(pixels - ground[:, None, None]).max(-1)
    mask = contrast > CONTRAST
    area = mask.sum((1, 2)) / (math.pi * radius**2)
    seen = (area > AREA[0]) & (area < AREA[1])
    y, x = np.mgrid[: arena.height, : arena.width]
    centre = np.full((frames, 2), np.nan)
    colour, shape = np.full(frames, -1), np.full(frames, -1)
    for t in np.flatnonzero(seen):
        weight = contrast[t] * mask[t]
        centre[t] = (x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()
        tint = np.median(pixels[t][mask[t]], 0)
        colour[t] = np.linalg.norm(COLOURS - tint, axis=1).argmin()
        if not hand:
            shape[t] = _nearest_shape(contrast[t], centre[t], arena.radius)
    return Track(seen, centre, colour, shape)


def agreement(seen: Track, lag: int) -> float:
    """Return the share of sightings `lag` frames apart of equal colour; NaN if there are none."""
    both = seen.seen[lag:] & seen.seen[:-lag]
    same = seen.colour[lag:] == seen.colour[:-lag]
    return float(same[both].mean()) if both.any() else math.nan


def lags(frames: int, native: int) -> list[int]:
    """Return the lags N for which a clip of so many frames has `agree@N`."""
    return [lag for lag in (round(share * native) for share in LAGS) if 0 < lag < frames]


def trajectory_rmse(seen: Track, arena: Arena) -> float:
    """Return the RMS distance from the best path, in shorter sides; NaN below ten sightings.

    Speed and phase are searched along each axis, from half the set's lowest speed to 1.5 times its
    highest: first on a grid, then in ever smaller steps around the best point.
    """
    times = np.flatnonzero(seen.seen)
    if len(times) < 10:
        return math.nan
    error = 0.0
    for axis, length in enumerate(arena.room):
        place = seen.centre[times, axis] - arena.radius
        speeds = np.linspace(0.5 * SPEEDS[0], 1.5 * SPEEDS[1], 91) * length / arena.native
        phases = np.linspace(0, 2 * length, 32, endpoint=False)
        best = math.inf
        step_v, step_p = speeds[1] - speeds[0], phases[1] - phases[0]
        for _ in range(4):
            path = phases[None, :, None] + speeds[:, None, None] * times
            off = ((folded(path, length) - place) ** 2).mean(-1)
            i, j = np.unravel_index(off.argmin(), off.shape)
            best = min(best, float(off[i, j]))
            speeds = speeds[i] + step_v * np.linspace(-1, 1, 9)
            phases = phases[j] + step_p * np.linspace(-1, 1, 9)
            step_v, step_p = step_v / 4, step_p / 4
        error += best
    return math.sqrt(error) / arena.side


def angular_speed_error(seen: Track, arena: Arena) -> float:
    """Return the mean relative error of the hand's speed against a turn in `period(native)` frames.

    Speeds are averaged over a quarter of a native length; NaN if the hand is never seen that long.
    """
    middle = np.array([arena.width, arena.height]) / 2 - 0.5
    offset = seen.centre - middle
    angle = np.arctan2(offset[:, 1], offset[:, 0])
    turned = np.diff(angle)  # NaN next to frames without a hand
    turned = (turned + math.pi) % (2 * math.pi) - math.pi
    span = max(arena.native // 4, 2)
    speeds = np.convolve(turned, np.ones(span) / span, "valid")
    speeds = speeds[np.isfinite(speeds)]
    if not len(speeds):
        return math.nan
    speed = 2 * math.pi / period(arena.native)
    direction = np.sign(np.median(speeds)) or 1.0
    return float(np.abs(direction * speeds - speed).mean() / speed)


def loop_psnr(pixels: np.ndarray) -> tuple[float, float]:
    """Return (near, far) PSNR of frame t against frame T - 1 - t.

    near: mean over the eighth of the pairs next to the turn. far: over the eighth at the ends.
    """
    half = len(pixels) // 2
    error = ((pixels[:half] - pixels[::-1][:half]) ** 2).mean((1, 2, 3))
    psnr = -10 * np.log10(np.maximum(error, 10 ** (-BEST_PSNR / 10)))
    part = max(half // 8, 1)
    return float(psnr[-part:].mean()), float(psnr[:part].mean())


def clock_errors(pixels: np.ndarray, ground: np.ndarray) -> dict[str, float]:
    """Compare the bar's end with where it should be at each time."""
    frames, height, width = pixels.shape[:3]
    first, last = (round(share * height) for share in LINES)
    # Take the background above and below the bar, which may fill more than half of the picture.
    rest = np.concatenate([pixels[:, :first], pixels[:, last:]], 1).reshape(frames, -1, 3)
    ground = np.median(rest, 1)[:, None, None]
    contrast = np.abs(pixels[:, first:last] - ground).max(-1).mean(1)  # [T, W]
    full = max(float(contrast.max()), CONTRAST)
    filled = (contrast / full).mean(1)
    due = np.arange(1, frames + 1) / (frames + 1)
    return {
        "clock_error": float(np.abs(filled - due).mean()),
        "backwards": float((np.diff(filled) < -1.0 / width).mean()),
    }


def _presence(seen: Track, expected: np.ndarray) -> dict[str, float]:
    blank = ~expected
    return {
        "visible": float(seen.seen[expected].mean()),
        "ghosts": float(seen.seen[blank].mean()) if blank.any() else math.nan,
    }


def _identity(seen: Track, native: int) -> dict[str, float]:
    colours = seen.colour[seen.seen]
    found = {f"agree@{lag}": agreement(seen, lag) for lag in lags(len(seen.seen), native)}
    found["switches"] = float((np.diff(colours) != 0).sum()) if len(colours) else math.nan
    early, late = (
        _usual(part) for part in (seen.colour[: native // 4], seen.colour[-(native // 4) :])
    )
    found["ends"] = math.nan if -1 in (early, late) else float(early == late)
    return found


def _usual(values: np.ndarray) -> int:
    """Return the most frequent value, ignoring -1; -1 if there is no other."""
    counts = np.bincount(values[values >= 0], minlength=1)
    return int(counts.argmax()) if counts.any() else -1


def _same_shape(seen: Track) -> float:
    shapes = seen.shape[seen.seen]
    return float((shapes == _usual(shapes)).mean()) if len(shapes) else math.nan


def _nearest_shape(contrast: np.ndarray, centre: np.ndarray, radius: float) -> int:
    """Return the shape that, drawn at `centre` with full contrast, is nearest to the object."""
    half_width = math.ceil(1.3 * radius)
    left, top = np.round(centre).astype(int) - half_width
    height, width = contrast.shape
    rows = slice(max(top, 0), min(top + 2 * half_width + 1, height))
    columns = slice(max(left, 0), min(left + 2 * half_width + 1, width))
    patch = contrast[rows, columns]
    patch = patch / max(float(patch.max()), 1e-6)
    y, x = np.mgrid[rows, columns]
    x, y = x - centre[0], y - centre[1]
    covers = (np.clip(0.5 - outline(shape, x, y, radius), 0, 1) for shape in range(len(SHAPES)))
    return int(np.argmin([((patch - cover) ** 2).sum() for cover in covers]))
