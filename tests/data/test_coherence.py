"""Each figure reacts to the fault that it is meant for, and to no other."""

import dataclasses
import math

import numpy as np
import pytest

from longreel.data.coherence import measure
from longreel.data.scenes import COLOURS
from longreel.data.synthetic import SETS, Arena, ClipSet

NATIVE = 21
ARENA = Arena(81, 40, 48, NATIVE)
CLIPS = 3


def sources(name):
    return [ClipSet(name, ARENA).scene(index) for index in range(CLIPS)]


def figures(name, clips):
    rows = [measure(name, clip, NATIVE) for clip in clips]
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]}


# Faults of the scene; each takes a scene and a random generator.


def other_colours(scene, random):
    """Change the identity every 20 frames."""
    moves = np.arange(len(scene.colour)) // 20
    return dataclasses.replace(scene, colour=(scene.colour + moves) % len(COLOURS))


def other_shapes(scene, random):
    return dataclasses.replace(scene, shape=(scene.shape + np.arange(len(scene.shape)) // 20) % 4)


def other_after_gap(scene, random):
    late = np.arange(len(scene.colour)) > len(scene.colour) // 2
    return dataclasses.replace(scene, colour=(scene.colour + late) % len(COLOURS))


def jitter(scene, random):
    """Move the object by 2 pixels at random, a twentieth of the picture."""
    return dataclasses.replace(scene, centre=scene.centre + random.normal(0, 2, scene.centre.shape))


def lost(scene, random):
    """Hide every third sighting."""
    return dataclasses.replace(
        scene, visible=scene.visible & (np.arange(len(scene.visible)) % 3 > 0)
    )


def haunted(scene, random):
    return dataclasses.replace(scene, visible=np.ones_like(scene.visible))


def too_fast(scene, random):
    """Turn a third faster."""
    turns = scene.angle - scene.angle[0]
    return dataclasses.replace(scene, angle=scene.angle[0] + turns * 4 / 3)


def turning_round(scene, random):
    half = len(scene.angle) // 2
    return dataclasses.replace(
        scene, angle=np.r_[scene.angle[:half], scene.angle[half:0:-1], 0][:81]
    )


def forgotten(scene, random):
    """Replace the scene on the way back, from shortly after the turn on."""
    other = ClipSet("pan", ARENA, seed=1).scene(int(random.integers(1000)))
    turn = len(scene.left) // 2 + 6

    class Two:
        def render(self):
            return np.concatenate([scene.render()[:turn], other.render()[turn:]])

    return Two()


def late(scene, random):
    """Fill the bar in half of the time."""
    return dataclasses.replace(scene, filled=np.minimum(2 * scene.filled, 1))


def restless(scene, random):
    return dataclasses.replace(scene, filled=scene.filled + random.normal(0, 0.05, 81))


# Faults of the pixels; each takes a clip and a random generator.


def dimmed(clip, random):
    """Let brightness waver by 6 %."""
    level = 1 + 0.06 * random.standard_normal((len(clip), 1, 1, 1))
    return np.clip(clip * level, 0, 255).astype(np.uint8)


def drifting(clip, random):
    level = np.linspace(0, 40, len(clip))[:, None, None, None]
    return np.clip(clip + level, 0, 255).astype(np.uint8)


def frozen(clip, random):
    return np.repeat(clip[:1], len(clip), 0)


def noisy(clip, random):
    return np.clip(clip + random.normal(0, 6, clip.shape), 0, 255).astype(np.uint8)


AGREE = {f"agree@{lag}" for lag in (5, 10, 21, 32, 42, 63)}
FAULTS = {
    ("bounce", other_colours): AGREE | {"switches", "ends"},
    ("bounce", other_shapes): {"same_shape"},
    ("bounce", jitter): {"trajectory_rmse"},
    ("bounce", lost): {"visible", "motion"},
    ("bounce", dimmed): {"flicker"},
    ("bounce", drifting): {"drift"},
    ("bounce", frozen): {"motion", "trajectory_rmse"},  # a frozen object does not fly either
    ("bounce", noisy): set(),
    # Pairs across the gap disagree; pairs on one side of it agree.
    ("occlude", other_after_gap): {"agree@32", "agree@42", "agree@63", "switches", "ends"},
    ("occlude", haunted): {"ghosts", "motion"},
    ("occlude", jitter): {"trajectory_rmse"},
    ("cross", other_after_gap): {"agree@63", "switches", "ends"},
    ("cross", lost): {"visible"},
    ("spin", too_fast): {"angular_speed_error"},
    ("spin", turning_round): {"angular_speed_error"},
    ("spin", other_colours): AGREE | {"switches", "ends"},
    ("spin", dimmed): {"flicker"},
    ("pan", forgotten): {"loop_far", "loop_gap"},
    ("pan", noisy): {"loop_near", "loop_far"},
    ("pan", frozen): {"motion"},
    ("clock", late): {"clock_error"},
    ("clock", restless): {"backwards", "clock_error"},
    ("clock", drifting): {"drift"},
}
# Smaller changes of a figure are ignored: noisy pictures also change motion and brightness.
SMALL = {
    "flicker": 1.2,
    "drift": 0.03,
    "motion": 0.02,
    "loop_near": 4,
    "loop_far": 4,
    "loop_gap": 4,
    "trajectory_rmse": 0.012,
    "angular_speed_error": 0.03,
    "clock_error": 0.02,
}


def moved(before, after):
    return {
        key
        for key in before
        if not math.isnan(before[key]) and not abs(before[key] - after[key]) <= SMALL.get(key, 0.02)
    }


@pytest.mark.parametrize(
    ("name", "fault"), FAULTS, ids=[f"{name}-{fault.__name__}" for name, fault in FAULTS]
)
def test_a_fault_moves_its_own_figures_alone(name, fault):
    random, scenes = np.random.default_rng(0), sources(name)
    clean = [scene.render() for scene in scenes]
    if fault in (dimmed, drifting, frozen, noisy):
        broken = [fault(clip, random) for clip in clean]
    else:
        broken = [fault(scene, random).render() for scene in scenes]
    before, after = figures(name, clean), figures(name, broken)
    assert moved(before, after) == FAULTS[name, fault], (before, after)


def test_clean_clips_are_without_fault():
    wanted = {
        "visible": 1, "ghosts": 0, "switches": 0, "ends": 1, "same_shape": 1, "backwards": 0,
        "loop_near": 60, "loop_far": 60, "loop_gap": 0, **dict.fromkeys(AGREE, 1),
    }  # fmt: skip
    for name in SETS:
        found = figures(name, [scene.render() for scene in sources(name)])
        for key, value in found.items():
            if math.isnan(value):  # the figure has no frames or pairs to look at
                assert name in ("occlude", "cross") or key == "ghosts", (name, key)
            elif key in wanted:
                assert value == pytest.approx(wanted[key], abs=1e-4), (name, key)
        assert found.get("trajectory_rmse", 0) < 0.005
        assert found.get("angular_speed_error", 0) < 0.005
        assert found.get("clock_error", 0) < 0.005
        assert found["flicker"] < 1 and found["motion"] > 0.01


def test_a_clip_without_an_object_says_so_and_nothing_more():
    blank = np.full((41, 40, 48, 3), 30, np.uint8)
    found = measure("bounce", blank, NATIVE)
    assert found["visible"] == 0
    for key in ("agree@21", "switches", "ends", "trajectory_rmse", "same_shape"):
        assert math.isnan(found[key])


def test_agreement_counts_pairs():
    """Compare with a count by hand: red for 30 frames, then blue for 11."""
    scene = ClipSet("bounce", Arena(41, 40, 48, NATIVE)).scene(0)
    scene = dataclasses.replace(scene, colour=np.r_[np.zeros(30, int), np.full(11, 2)])
    found = measure("bounce", scene.render(), NATIVE)
    assert found["switches"] == 1
    assert found["agree@5"] == pytest.approx((25 + 6) / 36)
    assert found["agree@32"] == 0


@pytest.mark.parametrize(
    ("name", "clip", "words"),
    [
        ("mix", np.zeros((21, 40, 48, 3), np.uint8), "one set"),
        ("hop", np.zeros((21, 40, 48, 3), np.uint8), "bounce, occlude, cross"),
        ("spin", np.zeros((21, 40, 48, 3)), "float64"),
        ("spin", np.zeros((21, 40, 16, 3), np.uint8), "24 pixels"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, clip, words):
    with pytest.raises(ValueError, match=words):
        measure(name, clip, NATIVE)
