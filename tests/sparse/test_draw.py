"""The content of a pattern's picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Scattered, Slashes

from longreel.sparse.draw import MOST_LAYOUTS, MOST_PIXELS, draw_pattern, frame_density
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Radial

GRID = TokenGrid(9, 5, 7, text=11)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, *[st.integers(1, 6)] * 3, text=st.integers(0, 40)), st.integers(0, 10**6)
)
def test_density_by_frame_distance_counts_token_pairs(grid, seed):
    pattern = Scattered(("raster", "own"), share=0.3, seed=seed)
    layout = build_layout(pattern, grid, 16)
    token = torch.arange(grid.video)
    frame = token // grid.per_frame
    distance = (frame[:, None] - frame).abs()
    for index, order in enumerate(pattern.order(grid, 16)):
        block_of = order.argsort() // 16
        computed = layout.to_dense()[index, block_of[:, None], block_of].double()
        for d, share in enumerate(frame_density(layout, grid, index)):
            assert share == pytest.approx(computed[distance == d].mean().item())


def images(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_a_single_diagonal_shows_among_3600_blocks():
    """Averaged to a third of its pixels, but drawn at each, and on the figure's own pixels."""
    figure = draw_pattern(Slashes(0), TokenGrid(16, 60, 60), 16, "thin", heads=1)
    axes = figure.axes[0]
    mask = axes.images[0].get_array()
    assert mask.shape == (MOST_PIXELS, MOST_PIXELS)
    assert axes.images[0].get_extent() == [0, 3600, 3600, 0]
    box = axes.get_position().transformed(figure.transFigure)
    assert (round(box.width), round(box.height)) == (MOST_PIXELS, MOST_PIXELS)
    assert (mask.diagonal() > 0.3).all()
    colour = axes.images[0].norm(float(mask.diagonal().min()))
    assert colour > 0.5, "pale, but not invisible"


def test_mask_and_region_are_those_of_the_layout():
    """Block by block, and for the centre token, token by token."""
    mask, region = images(draw_pattern(Radial(), GRID, 16, "radial"))
    layout = build_layout(Radial(), GRID, 16)
    assert torch.equal(torch.tensor(mask) > 0, layout.to_dense()[0])

    centre, token = (4 * 5 + 2) * 7 + 3, torch.arange(GRID.video)
    executed = layout.to_dense()[0, centre // 16][token // 16]
    kept = Radial().keep(GRID, torch.tensor(centre), token, 16)
    want = (executed + 2 * kept).view(9, 5, 7)
    columns = region.shape[1] // 8
    for index, frame in enumerate(want):
        down, across = index // columns * 6, index % columns * 8
        drawn = torch.tensor(region[down : down + 5, across : across + 7]).long()
        assert torch.equal(drawn, frame.long())


def test_one_column_a_layout_that_some_head_follows():
    for heads, layouts in ((None, 2), (4, 2), (1, 1)):
        figure = draw_pattern(Slashes(1), GRID, 16, "two orders", heads=heads)
        assert len(images(figure)) == 2 * layouts
        assert len(figure.axes[-1].lines) == layouts
    many = draw_pattern(Scattered(("own",) * 6), GRID, 16, "many")
    assert len(images(many)) == 2 * MOST_LAYOUTS


def test_long_videos_leave_frames_out_but_never_the_centre():
    grid = TokenGrid(301, 2, 3)
    figure = draw_pattern(Radial(), grid, 16, "long")
    axes = figure.axes[1]
    assert "101 of 301 drawn" in axes.get_title()
    marker = axes.lines[0]
    at = axes.images[0].get_array()[marker.get_ydata()[0], marker.get_xdata()[0]]
    assert at == 3  # kept and computed: the token itself


def test_one_frame_and_one_token():
    figure = draw_pattern(Radial(), TokenGrid(1, 1, 1), 16, "least")
    assert images(figure)[0].tolist() == [[1.0]]
    assert figure.axes[-1].lines[0].get_ydata().tolist() == [1.0]
