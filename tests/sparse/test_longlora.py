"""LongLoRA's groups, plain and shifted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import any_pair, in_order, layouts

from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import LongLora


def attended(video, group):
    """bool [2, video, video]: roll by half a group, attend within groups, roll back; tokens that
    only the wrap-around joins do not see each other."""
    index = torch.arange(video)
    plain = index[:, None] // group == index // group
    half = group // 2
    edges = [0, *range(half, video, group), video]
    shifted = torch.zeros(video, video, dtype=torch.bool)
    for start, end in zip(edges, edges[1:], strict=False):
        shifted[start:end, start:end] = True
    return torch.stack([plain, shifted])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, st.integers(1, 14), st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([0.01, 0.1, 0.25, 0.6, 1.0]),
    st.sampled_from([4, 16, 32]),
)
def test_groups(grid, share, block):
    pattern = LongLora(share)
    group = pattern.group(grid, block)
    assert group % (2 * block) == 0 and group >= 2 * block
    if share == 1:
        assert group >= grid.video
    elif group > 2 * block:
        assert abs(group - share * grid.video) <= block
    kept = attended(grid.video, group)
    for layout, blocks in enumerate(layouts(pattern, grid, block)):
        assert torch.equal(in_order(pattern, grid, block, layout), kept[layout])
        assert torch.equal(blocks, any_pair(kept[layout], block))
        tokens = torch.kron(blocks, torch.ones(block, block)).bool()
        assert torch.equal(tokens[: grid.video, : grid.video], kept[layout])  # edges are blocks'


@pytest.mark.parametrize("m", [2, 4, 5, 8])
def test_densities_of_m_groups(m):
    grid, block = TokenGrid(m, 16, 16), 32
    pattern = LongLora(1 / m)
    assert pattern.group(grid, block) == 256
    assert pattern.note(grid, block) is None
    plain, shifted = pattern.blocks(grid, block).double().mean((1, 2)).tolist()
    assert plain == pytest.approx(1 / m)
    assert shifted == pytest.approx((m - 0.5) / m**2)


def test_the_first_and_last_frames_do_not_mix():
    kept = LongLora(0.25).blocks(TokenGrid(8, 8, 8), 16)
    assert not kept[1, 0, -1] and not kept[1, -1, 0]


def test_a_rounded_group_says_so():
    note = LongLora(0.2).note(TokenGrid(21, 30, 52), 128)
    assert note == (
        "share=0.2 is 6552 of 32760 tokens; "
        "groups are 6656 tokens, a multiple of two blocks of 128."
    )


def test_half_of_the_heads_are_shifted():
    assert list(LongLora().head_layouts(4)) == [0, 0, 1, 1]
    assert list(LongLora().head_layouts(3)) == [0, 1, 1]


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_impossible_shares_are_named(share):
    with pytest.raises(ValueError, match=f"share={share} must be above 0 and at most 1"):
        LongLora(share)


def test_a_share_of_one_is_the_whole_video():
    grid = TokenGrid(13, 10, 12)  # the nearest two blocks of 32 would leave 24 tokens over
    assert LongLora(share=1.0).group(grid, 32) >= grid.video
    assert LongLora(share=1.0).blocks(grid, 32)[0].all()
