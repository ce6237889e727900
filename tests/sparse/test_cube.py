"""Radial's rule on cubes of tokens."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import any_pair

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Cube, Radial


def cubes_of(grid, sizes):
    """int64 [video]: a number for the cube of each token, by raster position; whole cubes first."""
    frames, height, width = sizes
    numbers = {}
    for t in range(grid.frames):
        for y in range(grid.height):
            for x in range(grid.width):
                numbers.setdefault((t // frames, y // height, x // width), []).append((t, y, x))
    whole = frames * height * width
    ranked = sorted(numbers, key=lambda cube: (len(numbers[cube]) < whole, cube))
    result = torch.empty(grid.frames, grid.height, grid.width, dtype=torch.int64)
    for number, cube in enumerate(ranked):
        for token in numbers[cube]:
            result[token] = number
    return result.flatten()


def reduced(tokens, cubes, rule):
    """bool [cubes, cubes] from [video, video]: columns of each pair of cubes, counted."""
    member = torch.nn.functional.one_hot(cubes).double().T
    column_density = member @ tokens.double() / member.sum(1, keepdim=True)
    touched = (column_density > 0).double() @ member.T
    if rule != "density":
        return touched > 0
    return (column_density > 1 / 3).double() @ member.T > 0.6 * touched


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, st.integers(1, 14), st.integers(1, 7), st.integers(1, 7)),
    st.builds(
        Cube,
        decay=st.sampled_from([0.2, 0.5, 1.0, 1.7]),
        sink=st.booleans(),
        near=st.integers(1, 3),
        rule=st.sampled_from(["density", "touch", "eq4"]),
    ),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([4, 16, 32]),
)
@example(TokenGrid(12, 6, 8), Cube(), (2, 2, 4), 16)  # a block for each cube
@example(TokenGrid(13, 7, 7), Cube(decay=0.2), (4, 2, 2), 16)  # ragged along every axis
@example(TokenGrid(40, 1, 3), Cube(sink=False), (4, 1, 1), 4)  # frames are skipped
def test_blocks_are_the_token_rule_of_cubes(grid, pattern, sizes, block):
    pattern = Cube(
        pattern.decay, pattern.sink, pattern.near, pattern.rule, "{}x{}x{}".format(*sizes)
    )
    radial = Radial(pattern.decay, pattern.sink, pattern.near, pattern.rule)
    token = torch.arange(grid.video)
    tokens = radial.keep(grid, token[:, None], token[None], block)
    assert torch.equal(pattern.keep(grid, token[:, None], token[None], block), tokens)

    cubes = cubes_of(grid, sizes)
    order = pattern.order(grid, block)
    assert torch.equal(order, torch.argsort(cubes, stable=True))
    kept = reduced(tokens, cubes, pattern.rule)
    expected = any_pair(kept[cubes[order][:, None], cubes[order]], block).fill_diagonal_(True)
    assert torch.equal(pattern.blocks(grid, block), expected)


@pytest.mark.parametrize("block, cube", [(128, "4x4x8"), (64, "4x4x4"), (32, "2x4x4")])
def test_a_cube_is_a_block_unless_told(block, cube):
    grid = TokenGrid(9, 10, 12)
    assert torch.equal(Cube().order(grid, block), Cube(cube=cube).order(grid, block))
    assert torch.equal(Cube().blocks(grid, block), Cube(cube=cube).blocks(grid, block))
    assert Cube().note(grid, block) is None


def test_radials_density_is_within_reach():
    """So that the two can be compared at equal cost; with "touch" they could not be."""
    grid = TokenGrid(64, 45, 80)
    target = build_layout(Radial(), grid).density
    low, _ = Cube().widths(grid, 128)
    assert build_layout(Cube(decay=low), grid).density < target < build_layout(Cube(), grid).density
    assert build_layout(Cube(decay=low, rule="touch"), grid).density > 2 * target


def test_frames_thinned_below_a_third_are_lost():
    """One frame in four fills a quarter of a cube's rows: too few for a kept column."""
    grid = TokenGrid(128, 8, 16)  # a frame is one block, so that frames are skipped early
    kept = Cube(sink=False, cube="4x4x8").blocks(grid, 128)
    slabs = kept.view(32, 4, 32, 4).any(3).any(1)
    distance = (torch.arange(32)[:, None] - torch.arange(32)).abs()
    assert slabs[distance == 0].all()
    assert not slabs[distance >= 8].any()
    assert Radial(sink=False).blocks(grid, 128)[0, 64]  # that far Radial sees one frame in 64


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cube": "4x4"}, "cube=4x4 must be three sizes of at least 1"),
        ({"rule": "cover"}, "rule='cover' is unknown"),
        ({"decay": 0.0}, "decay=0.0 must be positive"),
    ],
)
def test_impossible_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Cube(**wrong)


def test_cubes_that_are_no_blocks_are_told():
    note = Cube(cube="2x2x4").note(TokenGrid(8, 8, 8), 128)
    assert note is not None and note.startswith("cube=2x2x4 is 16 tokens, not a multiple")
