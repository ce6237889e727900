"""Sparse VideoGen's two masks: bands, orders, the first frame, and heads of both kinds."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import any_pair, in_order, layouts

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Spatial, SpatialTemporal, Temporal

grids = st.builds(TokenGrid, st.integers(1, 20), st.integers(1, 7), st.integers(1, 7))
fields = st.fixed_dictionaries(
    {"half_width": st.sampled_from([0.0, 0.3, 1.0, 2.5, 20.0]), "sink": st.booleans()}
)


def kept_tokens(grid, half_width, sink, *, temporal):
    """bool [video, video] by raster position."""
    f, s = grid.frames, grid.per_frame
    place = torch.empty(f, s, dtype=torch.int64)
    for i in range(f):
        for k in range(s):
            place[i, k] = k * f + i if temporal else i * s + k
    place = place.flatten()
    kept = (place[:, None] - place).abs() <= math.floor(half_width * s)
    if sink:
        kept[:, :s] = True
    return kept


@settings(max_examples=80, deadline=None, derandomize=True)
@given(grids, fields, st.sampled_from([4, 16, 32]))
@example(TokenGrid(40, 2, 3), {"half_width": 1.0, "sink": True}, 16)  # frames exceed a block
@example(TokenGrid(9, 5, 7), {"half_width": 0.1, "sink": True}, 16)  # the first frame straddles
def test_blocks_hold_the_bands(grid, fields, block):
    both = SpatialTemporal(**fields)
    token, together = torch.arange(grid.video), layouts(both, grid, block)
    for layout, single in enumerate((Spatial(**fields), Temporal(**fields))):
        kept = kept_tokens(grid, **fields, temporal=layout == 1)
        for pattern, index in ((single, 0), (both, layout)):
            found = pattern.keep(grid, token[:, None], token[None], block, index)
            assert torch.equal(found, kept)
        expected = any_pair(in_order(single, grid, block), block)
        assert torch.equal(single.blocks(grid, block), expected)
        assert torch.equal(together[layout], expected)


def test_the_token_major_order():
    """Token k of frame i at k * frames + i; a sink stands ahead of it."""
    grid = TokenGrid(3, 2, 2)
    plain, with_sink = (Temporal(sink=sink).order(grid, 16).tolist() for sink in (False, True))
    assert plain == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert with_sink == [0, 1, 2, 3, 4, 8, 5, 9, 6, 10, 7, 11]
    both = SpatialTemporal(sink=False).order(grid, 16)
    assert both.tolist() == [list(range(12)), plain]
    assert Spatial().order(grid, 16) is None


def test_the_first_frame_costs_temporal_heads_little():
    """Otherwise every block would hold one of its tokens in token-major order and be kept."""
    grid = TokenGrid(33, 15, 16)
    spread = Temporal(half_width=2.0)
    tokens = Temporal(half_width=2.0, sink=False)
    order = tokens.order(grid, 128)
    in_plain_order = any_pair(spread.keep(grid, order[:, None], order[None]), 128)
    assert in_plain_order.all()
    added = build_layout(spread, grid, 128).density - build_layout(tokens, grid, 128).density
    assert 0 < added < 0.1


@pytest.mark.parametrize("cls", [Spatial, Temporal])
def test_half_width_of_a_density(cls):
    """1 - (1 - w / frames)^2, the density of a band (released code): half widths for the densities
    at which Radial Attention compares the two, in frames."""

    def half_width(frames: int, density: float) -> float:
        return frames * (1 - math.sqrt(1 - density))

    assert half_width(64, 1 - 0.805) == pytest.approx(6.58, abs=0.01)
    assert half_width(128, 1 - 0.883) == pytest.approx(7.72, abs=0.01)
    grid = TokenGrid(30, 16, 16)
    pattern = cls(half_width=half_width(30, 0.3), sink=False)
    token = torch.arange(grid.video)
    kept = pattern.keep(grid, token[:, None], token[None]).double().mean().item()
    assert kept == pytest.approx(0.3, abs=1e-3)


def test_defaults_keep_about_thirty_percent_of_hunyuans_native_video():
    """33 frames of 3,600 tokens in the paper."""
    grid = TokenGrid(33, 45, 80)
    for pattern in (Spatial(sink=False), Temporal(sink=False)):
        assert 0.27 < build_layout(pattern, grid).density < 0.31


def test_spatial_heads_come_first():
    assert list(SpatialTemporal().head_layouts(5)) == [0, 0, 1, 1, 1]
    assert list(SpatialTemporal(spatial_heads=0.75).head_layouts(4)) == [0, 0, 0, 1]
    assert list(SpatialTemporal(spatial_heads=0.0).head_layouts(3)) == [1, 1, 1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Spatial(half_width=-1.0), "half_width=-1.0 must be 0 or more frames"),
        (lambda: Temporal(half_width=math.nan), "half_width=nan must be"),
        (lambda: SpatialTemporal(spatial_heads=1.5), "spatial_heads=1.5 must be a share"),
    ],
)
def test_impossible_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
