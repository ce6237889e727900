"""PowerAttention: powers of two, window and sink, in blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import any_pair, in_order

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Power


def test_a_row_by_hand():
    kept = Power(window=2, sink=1).blocks(TokenGrid(40, 4, 4), 16)
    assert kept[20].nonzero()[:, 0].tolist() == [
        *(0, 4, 12, 16, 18, 19, 20),
        *(21, 22, 24, 28, 36),
    ]
    assert torch.equal(kept[1:, 1:], kept[1:, 1:].T)  # all but the sink looks both ways


def test_sparsity_at_hunyuans_253_frames():
    layout = build_layout(Power(window=2, sink=1), TokenGrid(64, 45, 80), 128)
    assert round(100 * (1 - layout.density), 1) == 98.8


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, st.integers(1, 12), st.integers(1, 7), st.integers(1, 7)),
    st.builds(Power, window=st.integers(0, 6), sink=st.integers(0, 3)),
    st.sampled_from([4, 16, 32]),
)
def test_blocks_are_the_definition(grid, pattern, block):
    n = -(-grid.video // block)
    powers = {1 << e for e in range(n)} | {0}
    expected = torch.tensor(
        [
            [
                abs(q - kv) in powers or abs(q - kv) <= pattern.window or kv < pattern.sink
                for kv in range(n)
            ]
            for q in range(n)
        ]
    )
    assert torch.equal(pattern.blocks(grid, block), expected)
    assert torch.equal(any_pair(in_order(pattern, grid, block), block), expected)


def test_a_width_is_a_whole_number_of_blocks():
    grid = TokenGrid(10, 4, 4)
    assert Power().widths(grid, 16) == (0, 9)
    assert Power().with_width(3.6, grid, 16) == Power(window=4)
    assert Power(window=9).blocks(grid, 16).all()


@pytest.mark.parametrize("name", ["window", "sink"])
def test_impossible_parameters_are_named(name):
    with pytest.raises(ValueError, match=f"{name}=-1 must be 0 or more blocks"):
        Power(**{name: -1})
