"""Layers to full reach, against walks from token to token."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Scattered, Slashes

from longreel.sparse import reach
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Dense, Radial, SparsePattern
from longreel.sparse.reach import layers_to_full_reach


def token_walks(pattern, grid, block, heads=None):
    """The smallest m with (A | I)^m full, A the executed token pairs of all heads; None if none."""
    grid = grid.without_text()
    dense, order = build_layout(pattern, grid, block).to_dense(), pattern.order(grid, block)
    joined = torch.eye(grid.video, dtype=torch.bool)
    for index in range(len(dense)) if heads is None else set(pattern.head_layouts(heads)):
        place = torch.arange(grid.video)
        if order is not None:
            place = order.expand(len(dense), -1)[index].argsort()
        joined |= dense[index][place[:, None] // block, place[None] // block]
    reached, layers = joined, 1
    while not reached.all():
        wider = (reached.float() @ joined.float()) > 0
        if torch.equal(wider, reached):
            return None
        reached, layers = wider, layers + 1
    return layers


grids = st.builds(TokenGrid, *[st.integers(1, 7)] * 3, text=st.integers(0, 20))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    grids,
    st.lists(st.sampled_from(["raster", "shared", "own"]), min_size=1, max_size=3).map(tuple),
    st.sampled_from([0.0, 0.02, 0.1, 0.4]),
    st.integers(0, 10**6),
)
def test_reach_is_that_of_walks_over_tokens(grid, orders, share, seed):
    pattern = Scattered(orders, share=share, seed=seed)
    assert layers_to_full_reach(pattern, grid, 16) == token_walks(pattern, grid, 16)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.builds(TokenGrid, st.integers(4, 30), *[st.integers(1, 4)] * 2), st.integers(0, 2))
def test_bands_in_two_orders(grid, diagonals):
    for heads in (None, 1, 2):  # a single head follows the first layout alone
        pattern = Slashes(diagonals)
        want = token_walks(pattern, grid, 16, heads)
        assert layers_to_full_reach(pattern, grid, 16, heads) == want


@dataclass(frozen=True)
class Ring(SparsePattern):
    """Each block sees itself and the next one: not symmetric."""

    def keep(self, grid, q, kv, block=128, layout=0):
        blocks = math.ceil(grid.video / block)
        return (kv // block - q // block) % blocks <= 1

    def blocks(self, grid, block):
        index = torch.arange(math.ceil(grid.video / block))
        return (index[None] - index[:, None]) % len(index) <= 1


def test_worked_examples():
    grid = TokenGrid(10, 4, 8)  # 20 blocks of 16
    assert layers_to_full_reach(Dense(), grid, 16) == 1
    assert layers_to_full_reach(Ring(), grid, 16) == 19
    assert layers_to_full_reach(Slashes(3), grid, 16, heads=1) == 7  # 19 blocks, 3 a layer
    assert layers_to_full_reach(Slashes(0), grid, 16, heads=1) is None
    assert layers_to_full_reach(Ring(), TokenGrid(1, 4, 4), 16) == 1
    radial = layers_to_full_reach(Radial(), TokenGrid(40, 4, 8), 16)
    assert radial == token_walks(Radial(), TokenGrid(40, 4, 8), 16) >= 2


def test_text_joins_nothing():
    """It would carry everything everywhere in two layers."""
    grid = TokenGrid(10, 4, 8, text=7)
    assert layers_to_full_reach(Ring(), grid, 16) == 19


def test_past_the_budget_the_result_is_an_upper_bound(monkeypatch):
    grid = TokenGrid(4, 7, 9)
    cases = [Scattered(("own", "own"), share=0.25, seed=seed) for seed in range(12)]
    exact = [layers_to_full_reach(pattern, grid, 16) for pattern in cases]
    monkeypatch.setattr(reach, "MOST_CHECKS", 0)
    bounds = [layers_to_full_reach(pattern, grid, 16) for pattern in cases]
    assert all(bound >= layers for bound, layers in zip(bounds, exact, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_unions_over_runs(share):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(40, 70, generator=generator) < share
    bits = torch.rand(70, 130, generator=generator) < 0.1
    packed = reach._Runs(kept).union(reach._pack(bits))
    want = (kept.float() @ bits.float()) > 0
    assert all(torch.equal(reach._unpack(row, 130), w) for row, w in zip(packed, want, strict=True))
