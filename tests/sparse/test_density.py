"""Widths for a density, against a search through all of them."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Scattered, Slashes

from longreel.sparse.density import layer_density, nearest_density, with_density
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import PATTERNS, Dense, Radial, Spatial

GRID = TokenGrid(16, 12, 10, text=37)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, st.integers(2, 8), *[st.integers(1, 6)] * 2, text=st.integers(0, 40)),
    st.floats(0, 1),
)
def test_few_widths_give_the_nearest(grid, share):
    widest = math.ceil(grid.video / 16) - 1
    densities = [layer_density(Slashes(d), grid, 16) for d in range(widest + 1)]
    target = densities[0] + share * (densities[-1] - densities[0])
    found, density = with_density(Slashes(), grid, target, 16)
    assert density == densities[min(found.diagonals, widest)]  # one beyond may stay
    nearest = min(abs(d - target) for d in densities)
    assert abs(density - target) <= max(nearest, 1e-4) + 1e-12


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, *[st.integers(1, 6)] * 3, text=st.integers(0, 40)),
    st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple),
)
def test_the_density_is_that_of_the_executed_layout(grid, heads):
    pattern = Scattered(("raster", "own"), heads, share=0.3)
    layout = build_layout(pattern, grid, 16)
    want = layout.token_density(len(grid), pattern.head_layouts(7))
    assert layer_density(pattern, grid, 16, heads=7) == pytest.approx(want)
    assert layer_density(pattern, grid, 16) == pytest.approx(layout.token_density(len(grid)))


@pytest.mark.parametrize("name", [name for name, cls in PATTERNS.items() if cls.width])
def test_every_pattern_with_a_width_meets_a_reachable_density(name):
    small = {"tile": "2x3x2"} if name == "sliding_tile" else {}
    pattern = PATTERNS[name](**small)
    low, high = (
        layer_density(pattern.with_width(width, GRID, 16), GRID, 16, heads=4)
        for width in pattern.widths(GRID, 16)
    )
    assert low < high
    found, density = with_density(pattern, GRID, (low + high) / 2, 16, heads=4)
    assert type(found) is type(pattern)
    assert density == pytest.approx(layer_density(found, GRID, 16, heads=4))
    steps = 0.25 if name == "sliding_tile" else 0.05  # windows grow by two tiles at a time
    assert density == pytest.approx((low + high) / 2, abs=steps)


def test_widths_are_short_numbers():
    found, _ = with_density(Radial(), GRID, 0.6, 16)
    assert len(repr(found.decay)) <= 8


def test_a_width_that_meets_the_target_stays():
    """Though a wider or narrower one may meet it too."""
    pattern = Radial(decay=0.9)
    target = layer_density(pattern, GRID, 16)
    assert with_density(pattern, GRID, target, 16) == (pattern, target)


def test_other_settings_are_kept():
    found, density = with_density(Radial(near=2, sink=False), GRID, 0.55, 16)
    assert (found.near, found.sink) == (2, False)
    assert density == pytest.approx(0.55, abs=0.02)


def test_radial_says_why_it_goes_no_lower():
    with pytest.raises(ValueError) as error:
        with_density(Radial(), GRID, 0.05, 16)
    message = str(error.value)
    least, most = map(float, re.search(r"from (0\.\d+) to (\d\.\d+) on", message).groups())
    assert 0.05 < least < most <= 1
    assert "density=0.05 is out of reach: decay from" in message
    assert "halving decay again drops no block" in message
    assert "Text, which is always dense, takes 0.0375 of it." in message  # 1 - (1920 / 1957)^2
    found, density = with_density(Radial(), GRID, least + 0.001, 16)  # what it offers works
    assert density == pytest.approx(least, abs=0.02)


def test_a_width_that_ends_is_not_called_saturated():
    with pytest.raises(ValueError, match="diagonals from 0 to") as error:
        with_density(Slashes(), TokenGrid(8, 8, 8), 0.01, 16)
    assert "drops no block" not in str(error.value) and "Text" not in str(error.value)


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01, math.nan])
def test_impossible_targets_are_named(target):
    with pytest.raises(ValueError, match=f"density={target} must be above 0 and at most 1"):
        with_density(Radial(), GRID, target, 16)


def test_a_pattern_without_a_width_says_so():
    with pytest.raises(ValueError, match="Dense has no width"):
        with_density(Dense(), GRID, 0.5, 16)


def test_the_nearest_density_where_the_target_is_out_of_reach():
    grid = TokenGrid(12, 8, 12)
    reached = nearest_density(Spatial(), grid, 0.4, 32)
    assert reached == (*with_density(Spatial(), grid, 0.4, 32), True)
    radial, density, met = nearest_density(Radial(), grid, 0.01, 32)
    assert not met and density == layer_density(radial, grid, 32)
    assert density == min(
        layer_density(Radial().with_width(w, grid, 32), grid, 32) for w in radial.widths(grid, 32)
    )
    assert nearest_density(Dense(), grid, 0.4, 32) == (Dense(), 1.0, False)
