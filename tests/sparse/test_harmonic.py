"""HS against its definition, s / d, in the builder of Radial's released code."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import any_pair, reduce_pairs

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Harmonic, Radial


def kept_tokens(grid, block, *, decay, sink, near):
    """bool [video, video]: |k - l| <= s / d, and whole frames where d is small or a sink.

    A width below a block stays a block, in every floor(block / width)-th frame only.
    """
    s = grid.per_frame
    kept = torch.zeros(grid.frames, s, grid.frames, s, dtype=torch.bool)
    raster = (torch.arange(s)[:, None] - torch.arange(s)).abs()
    for i in range(grid.frames):
        for j in range(grid.frames):
            d = abs(i - j)
            if d <= near or (sink and j == 0):
                kept[i, :, j] = True
            elif s >= block * d or d % (block * d // s) == 0:
                kept[i, :, j] = raster <= max(s * decay / d, block)
    return kept.view(grid.video, grid.video)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, st.integers(1, 12), st.integers(1, 7), st.integers(1, 7)),
    st.fixed_dictionaries(
        {
            "decay": st.sampled_from([0.25, 0.5, 1.0, 1.75]),
            "sink": st.booleans(),
            "near": st.integers(1, 3),
        }
    ),
    st.sampled_from([2, 4, 16]),
)
@example(TokenGrid(40, 1, 3), {"decay": 1.0, "sink": False, "near": 1}, 4)  # frames are skipped
def test_blocks_are_the_definition_reduced(grid, fields, block):
    tokens = kept_tokens(grid, block, **fields)
    index = torch.arange(grid.video)
    pattern = Harmonic(**fields)
    assert torch.equal(pattern.keep(grid, index[:, None], index[None], block), tokens)
    expected = reduce_pairs(tokens, grid, block).fill_diagonal_(True)
    assert torch.equal(pattern.blocks(grid, block), expected)
    touched = Harmonic(rule="touch", **fields).blocks(grid, block)
    assert torch.equal(touched, any_pair(tokens, block))


def test_windows_fall_as_the_series():
    grid = TokenGrid(64, 30, 40)
    windows = [Harmonic().window(grid, d, 16) for d in (1, 2, 3, 4, 5, 60)]
    assert windows == [1200, 600, 400, 300, 240, 20]
    assert [Harmonic().window(grid, d, 128) for d in (9, 10, 18, 19, 20)] == [
        pytest.approx(1200 / 9),
        128,
        128,
        -1,
        128,
    ]


def test_density_beside_radials():
    """s / d is never above s / 2^r where a frame's tokens are a power of two."""
    grid = TokenGrid(32, 32, 32)
    harmonic, radial = (build_layout(p, grid, 16).density for p in (Harmonic(), Radial()))
    assert harmonic < radial


def test_unknown_rules_are_named():
    with pytest.raises(ValueError, match="rule='eq4' is unknown: take density or touch"):
        Harmonic(rule="eq4")  # type: ignore[arg-type]
