"""Properties of every pattern: shapes, rows, orders, text, widths, names, memory of lists."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import any_pair, in_order, layouts

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import PATTERNS, Dense, Radial, SparsePattern, pattern_name

decays = {
    "decay": st.sampled_from([0.2, 1.0, 1.7]),
    "sink": st.booleans(),
    "near": st.integers(1, 3),
}
bands = {"half_width": st.sampled_from([0.0, 0.7, 2.0]), "sink": st.booleans()}
# Each pattern's parameters, as unlike its defaults as small grids allow.
PARAMETERS = {
    "dense": {},
    "radial": decays | {"rule": st.sampled_from(["density", "touch", "eq4"])},
    "harmonic": decays | {"rule": st.sampled_from(["density", "touch"])},
    "spatial": bands,
    "temporal": bands,
    "spatial_temporal": bands | {"spatial_heads": st.sampled_from([0.0, 0.3, 1.0])},
    "power": {"window": st.integers(0, 4), "sink": st.integers(0, 3)},
    "longlora": {"share": st.sampled_from([0.05, 0.25, 1.0])},
    "sliding_tile": {
        "tile": st.sampled_from(["6x8x8", "2x2x4", "1x3x2"]),
        "windows": st.sampled_from(["3x3x3", "1x1x1 3x1x5 1x1x1", "1x3x1"]),
    },
    "cube": decays
    | {
        "rule": st.sampled_from(["density", "touch", "eq4"]),
        "cube": st.sampled_from(["auto", "2x3x3"]),
    },
}
grids = st.builds(TokenGrid, st.integers(1, 14), st.integers(1, 7), st.integers(1, 7))


def test_every_pattern_is_tested():
    assert list(PARAMETERS) == list(PATTERNS)


def cases(function):
    """Over all patterns, and for each over small grids, parameters and blocks."""
    wrapped = given(st.data())(function)
    wrapped = settings(max_examples=25, deadline=None, derandomize=True)(wrapped)
    return pytest.mark.parametrize("name", PATTERNS)(wrapped)


def drawn(name, data):
    pattern = data.draw(st.builds(PATTERNS[name], **PARAMETERS[name]))
    return pattern, data.draw(grids), data.draw(st.sampled_from([16, 32]))


@cases
def test_blocks_cover_rows_and_the_diagonal(name, data):
    pattern, grid, block = drawn(name, data)
    n = math.ceil(grid.video / block)
    for kept in layouts(pattern, grid, block):
        assert kept.dtype == torch.bool
        assert kept.shape == (n, n)
        assert kept.diagonal().all()
    assert torch.equal(pattern.blocks(grid, block), pattern.blocks(grid, block))


@cases
def test_blocks_are_the_kept_token_pairs(name, data):
    """Wherever the rule is that one pair suffices; patterns test their other rules themselves."""
    pattern, grid, block = drawn(name, data)
    if getattr(pattern, "rule", None) == "density" or name == "cube":
        return
    for layout, kept in enumerate(layouts(pattern, grid, block)):
        assert torch.equal(kept, any_pair(in_order(pattern, grid, block, layout), block))


@cases
def test_orders_are_permutations_that_invert(name, data):
    pattern, grid, block = drawn(name, data)
    order = pattern.order(grid, block)
    if order is None:
        return
    assert order.dtype == torch.int64
    assert order.shape in ((grid.video,), (len(layouts(pattern, grid, block)), grid.video))
    token = torch.arange(grid.video)
    for row in order.view(-1, grid.video):
        assert torch.equal(row.sort().values, token)
        assert torch.equal(row[row.argsort()], token)


@cases
def test_heads_follow_layouts_that_there_are(name, data):
    pattern, grid, block = drawn(name, data)
    count = len(layouts(pattern, grid, block))
    for heads in (1, 2, 5, 12):
        assigned = list(pattern.head_layouts(heads))
        assert len(assigned) == heads
        assert set(assigned) <= set(range(count))


@cases
def test_text_is_dense_and_changes_nothing_else(name, data):
    pattern, grid, block = drawn(name, data)
    text = data.draw(st.integers(1, 9))
    with_text = TokenGrid(grid.frames, grid.height, grid.width, text)
    token = torch.arange(len(with_text))
    for layout, blocks in enumerate(layouts(pattern, with_text, block)):
        kept = pattern.keep(with_text, token[:, None], token[None], block, layout)
        assert kept[grid.video :].all() and kept[:, grid.video :].all()
        video = token[: grid.video]
        alone = pattern.keep(grid, video[:, None], video[None], block, layout)
        assert torch.equal(kept[: grid.video, : grid.video], alone)
        one = pattern.keep(with_text, token[0], token, block, layout)
        assert torch.equal(one, kept[0])
        assert torch.equal(blocks, layouts(pattern, grid, block)[layout])


@pytest.mark.parametrize("name", [name for name, cls in PATTERNS.items() if cls.width])
@pytest.mark.parametrize("sizes", [(12, 8, 10), (9, 5, 7), (1, 2, 3), (3, 16, 16)])
def test_widths_run_from_sparse_to_full(name, sizes):
    grid, pattern = TokenGrid(*sizes), PATTERNS[name]()
    low, high = pattern.widths(grid, 16)
    assert low <= high
    ends = [pattern.with_width(width, grid, 16) for width in (low, high)]
    assert all(type(end) is type(pattern) for end in ends)
    sparse, full = (build_layout(end, grid, 16).density for end in ends)
    assert sparse <= full
    # Skipped frames stay skipped, and shifted groups never join the ends.
    assert full == 1 or name in ("radial", "harmonic", "cube", "longlora")
    assert pattern.width in set(vars(pattern))


@pytest.mark.slow
def test_the_longest_lists_take_little_memory():
    """460,800 tokens in under 1 GiB: one bool for each token pair would be 198 GiB.

    In a process of its own, because the peak of one that ran other tests says nothing, and
    `tracemalloc` does not see tensors.
    """
    script = """
import resource
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import PATTERNS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
for cls in PATTERNS.values():
    build_layout(cls(), TokenGrid(4, 3, 4), 16)  # loads what torch loads late
before = peak()
for name, cls in PATTERNS.items():
    grid = TokenGrid(128, 45, 80, 256)
    rows = build_layout(cls(), grid, 128).rows
    print(name, rows, (peak() - before) / 2**20)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    for line in run.stdout.splitlines():
        name, rows, gibibytes = line.split()
        assert int(rows) == 3602, name
        assert float(gibibytes) < 1, name


def test_patterns_by_name():
    assert pattern_name(Radial(decay=0.5)) == "radial"
    for name, cls in PATTERNS.items():
        assert isinstance(cls(), SparsePattern)
        assert pattern_name(cls()) == name
        assert cls() == cls() and hash(cls()) == hash(cls())  # a value: layouts are cached by it
    with pytest.raises(ValueError, match=f"object is not in PATTERNS: {', '.join(PATTERNS)}"):
        pattern_name(object())  # type: ignore[arg-type]


def test_dense_keeps_everything():
    grid, token = TokenGrid(3, 4, 5, text=2), torch.arange(62)
    assert Dense().keep(grid, token[:, None], token[None]).all()
    assert Dense().keep(grid, token[:, None], token[None]).shape == (62, 62)
    assert Dense().blocks(grid, 16).shape == (4, 4)
    assert Dense().blocks(grid, 16).all()
