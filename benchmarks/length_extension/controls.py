"""Checks that must hold before any row is trusted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longreel.data.scenes import COLOURS
from longreel.data.synthetic import SETS, ClipSet
from longreel.sparse.patterns import Spatial

from .cells import control_cells
from .results import Interval, Store, difference, interval
from .settings import Scale

CHANCE = 1 / len(COLOURS)
# Bounds on the base at the native length: (set, metric, least or most, the value).
CEILINGS = (
    ("bounce", "visible", "least", 0.9),
    ("bounce", "agree@10", "least", 0.9),
    ("bounce", "trajectory_rmse", "most", 0.05),
    ("spin", "visible", "least", 0.9),
    ("spin", "angular_speed_error", "most", 0.15),
    ("pan", "loop_far", "least", 18.0),
)
# Where `none` at four times the length must be worse than the base: (set, metric, sign of better).
WORSE = (
    ("bounce", "trajectory_rmse", -1),
    ("spin", "angular_speed_error", -1),
    ("clock", "clock_error", -1),
    ("bounce", "ends", 1),
)


@dataclass(frozen=True)
class Check:
    """Holds a check's outcome. passed: None while the results it needs are missing."""

    name: str
    passed: bool | None
    found: str


def checks(store: Store, scale: Scale) -> list[Check]:
    return [
        _ceiling(store),
        _no_tuning_is_worse(store),
        _window_at_chance(store, scale),
        _captions_tell_nothing(scale),
        _other_captions(store),
    ]


def _ceiling(store: Store) -> Check:
    name = "at the native length the base is near its ceiling on bounce, spin and pan"
    base, found, passed = store.of_row("base", 1), [], True
    if not base:
        return Check(name, None, "not measured yet")
    for task, metric, kind, bound in CEILINGS:
        value = interval(base, task, metric)
        mean = None if value is None else value.mean
        good = mean is not None and (mean >= bound if kind == "least" else mean <= bound)
        passed &= good
        found.append(f"{task} {metric} {value} (at {kind} {bound})")
    return Check(name, passed, "; ".join(found))


def _no_tuning_is_worse(store: Store) -> Check:
    name = "without a LoRA four times the length is clearly worse than the native one"
    base, none = store.of_row("base", 1), store.of_row("none", 4)
    if not base or not none:
        return Check(name, None, "not measured yet")
    worse, found = 0, []
    for task, metric, better in WORSE:
        native, longer = interval(base, task, metric), interval(none, task, metric)
        if native is None or longer is None:
            continue
        clear = not native.overlaps(longer) and (native.mean - longer.mean) * better > 0
        worse += clear
        found.append(f"{task} {metric} {native} to {longer}{', clearly' if clear else ''}")
    return Check(name, worse >= 2, "; ".join(found) + " (two must be clear)")


def _window_at_chance(store: Store, scale: Scale) -> Check:
    name = "a window that cannot reach across the gap is at chance on occlude"
    (cell,) = (cell for cell in control_cells() if cell.row == "window-of-1")
    assert isinstance(cell.pattern, Spatial)
    # Blocks are kept whole, so a window reaches up to two blocks further than its width.
    grid = scale.grid(4)
    reach = scale.layers * (cell.pattern.half_width + 2 * scale.block / grid.per_frame)
    gap = int((~ClipSet("occlude", scale.arena(4)).scene(0).visible).sum())  # pyright: ignore
    said = f"its {scale.layers} layers reach {reach:.0f} frames, the gap is {gap}"
    window = store.of_row(cell.row, 4)
    if not window:
        return Check(name, None, said)
    ends = interval(window, "occlude", "ends")
    at_chance = ends is not None and ends.low <= CHANCE <= ends.high
    return Check(name, at_chance and reach < gap, f"{said}; ends agree {ends}, chance {CHANCE:.3f}")


def _captions_tell_nothing(scale: Scale) -> Check:
    """Check by counting that, given the caption, all colours are equally likely."""
    source, clips = ClipSet("mix", scale.arena(1)), 600 * len(SETS)
    counts: Counter[tuple[str, int]] = Counter()
    for index in range(0, clips, len(SETS)):  # `bounce` alone has a colour in every clip
        scene = source.scene(index)
        counts[source.caption(index), int(scene.colour[0])] += 1  # pyright: ignore
    captions = {caption for caption, _ in counts}
    chi = 0.0
    for caption in captions:
        row = [counts[caption, colour] for colour in range(len(COLOURS))]
        mean = sum(row) / len(row)
        chi += sum((count - mean) ** 2 / mean for count in row)
    # 99.9th percentile of chi-squared with 10 degrees of freedom, five for each caption.
    return Check(
        "captions do not name the identity",
        chi < 29.6,
        f"chi-squared of colour given caption {chi:.1f}, 29.6 at the 99.9th percentile",
    )


def _other_captions(store: Store) -> Check:
    name = "another caption of the same set changes nothing"
    base, other = store.of_row("base", 1), store.of_row("base-other-captions", 1)
    if not base or not other:
        return Check(name, None, "not measured yet")
    shown = interval(base, "bounce", "visible")
    if shown is None or shown.mean < 0.5:
        return Check(name, False, f"samples show too few objects to tell: {shown}")
    found, passed = [], True
    for task, metric in (
        ("bounce", "visible"),
        ("bounce", "ends"),
        ("spin", "angular_speed_error"),
    ):
        value: Interval | None = difference(base, other, task, metric)
        if value is None:
            continue
        passed &= value.low <= 0 <= value.high
        found.append(f"{task} {metric} differs by {value}")
    return Check(name, passed and bool(found), "; ".join(found))
