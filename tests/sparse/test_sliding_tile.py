"""Sliding Tile Attention: the paper's figures, windows at the borders, tiles that do not fit."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import any_pair, in_order, layouts

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import SlidingTile

CANVAS = TokenGrid(30, 48, 80)  # HunyuanVideo's in the paper


@pytest.mark.parametrize("windows, dropped", [("3x3x3", 91.0), ("5x5x5", 58.3), ("5x3x5", 75.0)])
def test_sparsity_of_the_paper(windows, dropped):
    pattern = SlidingTile(windows=windows)
    assert round(100 * (1 - build_layout(pattern, CANVAS).density), 1) == dropped
    counts = pattern.blocks(CANVAS, 128).sum(-1)
    assert counts.unique().numel() == 1  # every query has as many keys, at the borders too


def keys_along(place, count, window):
    """Tiles that the tile at `place` sees along an axis."""
    if window >= count:
        return set(range(count))
    start = min(max(place - window // 2, 0), count - window)
    return set(range(start, start + window))


def kept_tokens(grid, tile, window):
    """bool [video, video] by raster position."""
    sides = (grid.frames, grid.height, grid.width)
    counts = [-(-side // size) for side, size in zip(sides, tile, strict=True)]
    places = [
        tuple(x // size for x, size in zip(token, tile, strict=True))
        for token in itertools.product(*map(range, sides))
    ]
    sees = {}
    for place in set(places):
        axes = [keys_along(*axis) for axis in zip(place, counts, window, strict=True)]
        sees[place] = torch.tensor(
            [all(p in axis for p, axis in zip(other, axes, strict=True)) for other in places]
        )
    return torch.stack([sees[place] for place in places])


odd = st.sampled_from([1, 3, 5])
triples = st.tuples(odd, odd, odd)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.lists(triples, min_size=1, max_size=3),
    st.sampled_from([4, 16, 32]),
)
@example(TokenGrid(8, 8, 8), (2, 2, 4), [(3, 1, 3)], 16)  # a block for each tile
@example(TokenGrid(7, 7, 7), (2, 4, 4), [(1, 1, 1), (3, 3, 3)], 16)  # ragged along every axis
def test_blocks_hold_the_windows(grid, tile, windows, block):
    pattern = SlidingTile(
        "x".join(map(str, tile)), ",".join("x".join(map(str, w)) for w in windows)
    )
    token = torch.arange(grid.video)
    different = list(dict.fromkeys(windows))
    found = layouts(pattern, grid, block)
    assert len(found) == len(different)
    for layout, window in enumerate(different):
        kept = kept_tokens(grid, tile, window)
        assert torch.equal(pattern.keep(grid, token[:, None], token[None], block, layout), kept)
        expected = any_pair(in_order(pattern, grid, block, layout), block)
        assert torch.equal(found[layout], expected)


def test_tiles_are_runs_and_whole_ones_begin_with_blocks():
    grid, pattern = TokenGrid(5, 6, 9), SlidingTile("2x2x4")
    order = pattern.order(grid, 16)
    t, y, x = order // 54, order // 9 % 6, order % 9
    tiles = list(zip((t // 2).tolist(), (y // 2).tolist(), (x // 4).tolist(), strict=True))
    runs = [(tile, len(list(run))) for tile, run in itertools.groupby(tiles)]
    assert len(runs) == len(set(tiles)) == 3 * 3 * 3
    whole = 2 * 3 * 2
    assert [size for _, size in runs[:whole]] == [16] * whole
    assert max(size for _, size in runs[whole:]) < 16
    assert runs[0][0] == (0, 0, 0) and runs[1][0] == (0, 0, 1) and runs[2][0] == (0, 1, 0)


def test_windows_go_to_the_heads_in_turn():
    pattern = SlidingTile(windows="3x3x3, 5x5x5 3x3x3")
    assert list(pattern.head_layouts(5)) == [0, 1, 0, 0, 1]
    assert len(layouts(pattern, CANVAS, 128)) == 2


def test_widths_scale_all_windows():
    pattern = SlidingTile(windows="3x3x3 5x3x5")
    low, high = pattern.widths(CANVAS, 128)
    assert pattern.with_width(1.0, CANVAS, 128) == pattern
    assert pattern.with_width(low, CANVAS, 128).windows == "1x1x1 1x1x1"
    assert pattern.with_width(high, CANVAS, 128).blocks(CANVAS, 128).all()
    assert pattern.with_width(1.5, CANVAS, 128).windows == "3x5x5 7x5x9"


def test_axes_grow_one_after_another():
    """So that a density target has more to choose from: all at once, 27 tiles become 125."""
    scaled = [SlidingTile().with_width(v, CANVAS, 128).windows for v in (1.1, 1.2, 1.4, 1.6)]
    assert scaled == ["3x3x3", "3x3x5", "3x5x5", "5x5x5"]


def test_blocks_that_straddle_tiles_are_told():
    assert SlidingTile().note(CANVAS, 128) is None
    note = SlidingTile(tile="4x4x4").note(CANVAS, 128)
    assert note is not None
    assert note.startswith("tile=4x4x4 is 64 tokens, not a multiple of block=128")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"windows": "3x4x3"}, "windows=3x4x3: 3x4x3 must be odd along each axis"),
        ({"windows": "3x3"}, "windows=3x3 must be three sizes of at least 1"),
        ({"windows": ""}, "windows= must be three sizes"),
        ({"tile": "0x8x8"}, "tile=0x8x8 must be three sizes of at least 1"),
    ],
)
def test_impossible_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SlidingTile(**wrong)
