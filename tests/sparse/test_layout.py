"""The lists that kernels walk, against the block matrices they came from."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Scattered, Slashes

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import BlockLayout, build_layout, kept_blocks, token_densities
from longreel.sparse.patterns import Dense, Radial, SparsePattern

LISTS = ("row_indptr", "row_indices", "col_indptr", "col_indices")


def expand(layout, tokens):
    """bool [layouts, tokens, tokens]: which token pairs a layout computes."""
    token = torch.arange(tokens) // layout.block
    return layout.to_dense()[:, token[:, None], token[None]]


def listed(indptr, indices, layout, row):
    return indices[indptr[layout, row] : indptr[layout, row + 1]].tolist()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_lists_hold_the_matrix_by_row_and_by_column(layouts, rows, share, seed):
    kept = torch.rand(layouts, rows, rows, generator=torch.Generator().manual_seed(seed)) < share
    layout = BlockLayout.from_dense(kept, 16)
    assert layout.rows == rows
    assert all(getattr(layout, name).dtype == torch.int32 for name in LISTS)
    assert layout.row_indptr.shape == layout.col_indptr.shape == (layouts, rows + 1)
    for index in range(layouts):
        for block in range(rows):
            row = listed(layout.row_indptr, layout.row_indices, index, block)
            col = listed(layout.col_indptr, layout.col_indices, index, block)
            assert row == kept[index, block].nonzero()[:, 0].tolist()  # hence ascending
            assert col == kept[index, :, block].nonzero()[:, 0].tolist()
    assert torch.equal(layout.to_dense(), kept)
    assert layout.density == pytest.approx(kept.double().mean().item())


def test_offsets_of_several_layouts_are_absolute():
    kept = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 1]], [[1, 1], [0, 0]]]).bool()
    layout = BlockLayout.from_dense(kept, 16)
    assert layout.row_indptr.tolist() == [[0, 1, 3], [3, 3, 4], [4, 6, 6]]
    assert layout.row_indices.tolist() == [0, 0, 1, 1, 0, 1]
    assert layout.col_indptr.tolist() == [[0, 2, 3], [3, 3, 4], [4, 5, 6]]
    assert layout.col_indices.tolist() == [0, 1, 1, 1, 0, 0]


def test_one_matrix_is_one_layout():
    kept = torch.eye(3, dtype=torch.bool)
    assert torch.equal(BlockLayout.from_dense(kept, 16).to_dense(), kept[None])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(TokenGrid, *[st.integers(1, 9)] * 3, text=st.integers(0, 70)),
    st.sampled_from([16, 32]),
    st.booleans(),
)
def test_layouts_are_the_pattern_plus_text(grid, block, sink):
    layout = build_layout(Radial(sink=sink), grid, block)
    kept = layout.to_dense()[0]
    assert layout.rows == math.ceil(len(grid) / block)
    assert kept.any(0).all() and kept.any(1).all() and kept.diagonal().all()

    video = Radial(sink=sink).blocks(grid.without_text(), block)
    first_text = grid.video // block if grid.text else layout.rows
    assert torch.equal(kept[:first_text, :first_text], video[:first_text, :first_text])
    assert kept[first_text:].all() and kept[:, first_text:].all()

    tokens = expand(layout, len(grid))[0]
    assert layout.density == pytest.approx(kept.double().mean().item())
    assert layout.token_density(len(grid)) == pytest.approx(tokens.double().mean().item())
    assert tokens[grid.video :].all() and tokens[:, grid.video :].all()


def test_token_density_of_several_layouts_is_their_mean():
    kept = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = BlockLayout.from_dense(kept, 16)
    tokens = expand(layout, 50).double().mean().item()
    assert layout.token_density(50) == pytest.approx(tokens)
    for index, share in enumerate(layout.token_densities(50)):
        assert share == pytest.approx(expand(layout, 50)[index].double().mean().item())
    heads = [0, 2, 2, 1, 2]
    weighted = expand(layout, 50)[heads].double().mean().item()
    assert layout.token_density(50, heads) == pytest.approx(weighted)
    for wrong in (48, 65):
        with pytest.raises(ValueError, match=f"{wrong} tokens do not end in the last of 4 blocks"):
            layout.token_density(wrong)


@dataclass(frozen=True)
class Diagonal(SparsePattern):
    """Each block sees itself: unlike Radial, nothing at the end of the video is dense."""

    def keep(self, grid, q, kv, block=128, layout=0):
        return q // block == kv // block

    def blocks(self, grid, block):
        return torch.eye(math.ceil(grid.video / block), dtype=torch.bool)


@pytest.mark.parametrize("text, first_dense", [(0, 32), (3, 31), (12, 31), (13, 31), (40, 31)])
def test_text_begins_inside_a_block(text, first_dense):
    """500 video tokens: block 31 holds the last 4 of them and the first of the text."""
    layout = build_layout(Diagonal(), TokenGrid(20, 5, 5, text), 16)
    kept = torch.eye(layout.rows, dtype=torch.bool)
    kept[first_dense:] = kept[:, first_dense:] = True
    assert torch.equal(layout.to_dense()[0], kept)


def test_text_begins_at_a_block():
    kept = build_layout(Diagonal(), TokenGrid(4, 4, 4, text=1), 16).to_dense()[0]
    assert kept.sum() == 4 + 5 + 4  # the diagonal, the text's row, its column


def test_text_never_rebuilds_the_video_blocks():
    grid = TokenGrid(6, 8, 8)  # 384 tokens, 24 blocks of 16
    first = build_layout(Radial(), TokenGrid(6, 8, 8, text=17), 16)
    assert build_layout(Radial(), TokenGrid(6, 8, 8, text=32), 16) is first
    assert build_layout(Radial(), TokenGrid(6, 8, 8, text=33), 16) is not first
    assert build_layout(Radial(), grid, 16) is not first
    assert build_layout(Radial(sink=False), TokenGrid(6, 8, 8, text=17), 16) is not first


def test_each_geometry_has_its_own_layout():
    """A cache keyed by length alone would mix up grids of as many tokens in another shape."""
    wide, tall = (build_layout(Radial(), TokenGrid(*g), 16) for g in ((16, 4, 9), (9, 8, 8)))
    assert wide.rows == tall.rows
    assert not torch.equal(wide.to_dense(), tall.to_dense())


def test_dense_is_everything():
    layout = build_layout(Dense(), TokenGrid(3, 5, 5, text=9), 16)
    assert layout.to_dense().all()
    assert layout.density == layout.token_density(84) == 1.0


def test_to_moves_every_list():
    layout = build_layout(Dense(), TokenGrid(2, 4, 4), 16).to("meta")
    assert all(getattr(layout, name).is_meta for name in LISTS)
    assert layout.block == 16


@pytest.mark.parametrize("block", [0, -128, 8, 96, 100])
def test_impossible_blocks_are_named(block):
    with pytest.raises(ValueError, match=f"block={block} must be one of"):
        build_layout(Radial(), TokenGrid(2, 4, 4), block)


# Orders

grids = st.builds(TokenGrid, *[st.integers(1, 6)] * 3, text=st.integers(0, 40))
several = st.builds(
    Scattered,
    orders=st.lists(st.sampled_from(["raster", "shared", "own"]), min_size=1, max_size=4).map(
        tuple
    ),
    share=st.floats(0, 0.6),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, several, st.sampled_from([16, 32]))
def test_orders_invert_and_leave_text_in_place(grid, pattern, block):
    layout = build_layout(pattern, grid, block)
    raster = torch.arange(layout.rows * block)
    if layout.order is None:
        assert torch.equal(
            pattern.order(grid, block), raster[: grid.video].expand(layout.layouts, -1)
        )
        return
    assert layout.order.dtype == layout.inverse.dtype == torch.int32
    assert layout.order.shape == layout.inverse.shape == (layout.layouts, layout.rows * block)
    for order, inverse in zip(layout.order.long(), layout.inverse.long(), strict=True):
        assert torch.equal(order[inverse], raster) and torch.equal(inverse[order], raster)
        assert torch.equal(order[grid.video :], raster[grid.video :])
    assert torch.equal(layout.order[:, : grid.video].long(), pattern.order(grid, block))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, several, st.sampled_from([16, 32]))
def test_layouts_with_orders_compute_the_pattern_and_text(grid, pattern, block):
    """`keep` is by raster position: the blocks, brought back from their order, are it."""
    layout, token = build_layout(pattern, grid, block), torch.arange(len(grid))
    computed = expand(layout, layout.rows * block)
    mixed = grid.video // block * block if grid.text else grid.video  # later ones stand with text
    for index in range(layout.layouts):
        position = token if layout.inverse is None else layout.inverse[index, : len(grid)].long()
        in_raster = computed[index][position[:, None], position[None]]
        want = pattern.keep(grid, token[:, None], token[None], block, index)
        beside_text = position >= mixed
        want = want | beside_text[:, None] | beside_text[None]
        assert torch.equal(in_raster, want)
        assert want.diagonal().all() and want[grid.video :].all() and want[:, grid.video :].all()
        share = layout.token_densities(len(grid))[index]
        assert share == pytest.approx(want.double().mean().item())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(grids, several, st.sampled_from([16, 32]))
def test_unlisted_blocks_have_the_same_density(grid, pattern, block):
    kept = kept_blocks(pattern, grid, block)
    assert torch.equal(kept, build_layout(pattern, grid, block).to_dense())
    listed = build_layout(pattern, grid, block).token_densities(len(grid))
    assert token_densities(kept, block, len(grid)) == pytest.approx(listed)


def test_one_matrix_under_several_orders_is_several_layouts():
    layout = build_layout(Slashes(1), TokenGrid(6, 4, 4, text=5), 16)
    assert layout.layouts == 2 and len(kept_blocks(Slashes(1), TokenGrid(6, 4, 4), 16)) == 1
    dense = layout.to_dense()
    assert torch.equal(dense[0], dense[1])
    assert layout.order[0].tolist() == list(range(7 * 16))
    assert layout.order[1, :8].tolist() == [0, 16, 32, 48, 64, 80, 1, 17]


def test_raster_orders_are_none():
    assert build_layout(Scattered(("raster", "raster")), TokenGrid(4, 4, 4), 16).order is None
    assert build_layout(Scattered(("raster", "own")), TokenGrid(4, 4, 4), 16).order is not None


def test_an_order_that_is_no_permutation_is_named():
    kept = torch.eye(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="not a permutation"):
        BlockLayout.from_dense(kept, 16, torch.tensor([[0, 1, 1, 3]]))


def test_to_moves_orders():
    layout = build_layout(Slashes(), TokenGrid(3, 4, 4), 16).to("meta")
    assert layout.order.is_meta and layout.inverse.is_meta
