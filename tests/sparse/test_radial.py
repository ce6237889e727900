"""Radial against the paper's tables, a worked example and an independent token-level oracle."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import PATTERNS, Dense, Radial, SparsePattern, pattern_name

# The trained settings of arXiv 2506.19852 (latent grids), and how much of the mask they drop, in
# percent. The paper prints them cut to one decimal: 80.8, 88.3, 76.4, 85.5 and 73.6.
PAPER = {
    "hunyuan 720x1280, 253 frames": ((64, 45, 80), 80.831),
    "hunyuan 720x1280, 509 frames": ((128, 45, 80), 88.372),
    "mochi 480x848, 331 frames": ((56, 30, 53), 76.408),
    "mochi 480x848, 667 frames": ((112, 30, 53), 85.592),
    "wan 768x1280, 161 frames": ((41, 48, 80), 73.612),
}


@pytest.mark.parametrize("sizes, dropped", PAPER.values(), ids=PAPER.keys())
def test_sparsity_of_the_paper(sizes, dropped):
    layout = build_layout(Radial(), TokenGrid(*sizes), block=128)
    assert 100 * (1 - layout.density) == pytest.approx(dropped, abs=5e-4)


def test_the_longest_list_takes_seconds_and_little_memory():
    """460,800 tokens in under 1 GiB and 20 s: one bool for each token pair would be 198 GiB.

    In a process of its own, because the peak of one that ran other tests says nothing, and
    `tracemalloc` does not see tensors.
    """
    script = """
import resource, time
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Radial
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
build_layout(Radial(), TokenGrid(4, 3, 4), 16)  # loads what torch loads late
before, start = peak(), time.monotonic()
layout = build_layout(Radial(), TokenGrid(128, 45, 80), 128)
print(layout.rows, (peak() - before) / 2**20, time.monotonic() - start)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    rows, gibibytes, seconds = map(float, run.stdout.split())
    assert rows == 3600
    assert gibibytes < 1
    assert seconds < 20


def test_worked_example():
    """Eight frames of 4 x 4, blocks of 4; the released code's rule by hand."""
    grid = TokenGrid(8, 4, 4)
    without_sink = Radial(sink=False).blocks(grid, 4)
    kept = Radial().blocks(grid, 4)
    assert (without_sink.sum().item(), kept.sum().item()) == (860, 888)
    assert torch.equal(without_sink, without_sink.T)

    pairs = without_sink.view(8, 4, 8, 4).sum((1, 3))  # blocks kept of each frame pair
    assert pairs[0].tolist() == [16, 16, 14, 14, 10, 10, 10, 10]

    rows = [row.nonzero()[:, 0].tolist() for row in without_sink]
    assert rows[0] == [*range(11), 12, 13, 14, 16, 17, 20, 21, 24, 25, 28, 29]
    assert rows[1] == sorted([*rows[0], 11, 15, 18, 22, 26, 30])
    far = [18, 19, 22, 23, 26, 27, 30, 31]
    assert rows[3] == [*range(8), 9, 10, 11, 13, 14, 15, *far]


def kept_tokens(grid, block, *, decay, sink, near):
    """bool [video, video]: the rule of radial attention, token by token.

    Written from its description, without looking at `Radial`: octaves are powers of two just above
    the frame size and the distance, a window is never thinner than a block, and where it would be
    only every so many frames one is seen.
    """

    def octave(x):
        return 2 ** math.ceil(math.log2(x + 1))

    s = grid.per_frame
    kept = torch.zeros(grid.frames, s, grid.frames, s, dtype=torch.bool)
    raster = (torch.arange(s)[:, None] - torch.arange(s)[None]).abs()
    for i in range(grid.frames):
        for j in range(grid.frames):
            distance = abs(i - j)
            if distance <= near or (sink and j == 0):
                kept[i, :, j] = True
                continue
            share = octave(s) / octave(distance)
            if share < block and distance % math.floor(block / share):
                continue
            kept[i, :, j] = raster <= max(share * decay, block)
    return kept.view(grid.video, grid.video)


def reduce_pairs(tokens, grid, block):
    """bool [blocks, blocks] from `kept_tokens`, by the released code's density rule.

    Every frame pair alone, in a canvas at its offset to the block grid. The canvas is cut to whole
    blocks and the pairs are joined by OR; the sequence's partial last block is dense.
    """
    s, n = grid.per_frame, math.ceil(grid.video / block)
    kept = torch.zeros(n + 1, n + 1, dtype=torch.bool)  # a canvas may reach one block too far
    for i in range(grid.frames):
        for j in range(grid.frames):
            pair = tokens[i * s : (i + 1) * s, j * s : (j + 1) * s]
            down, right = i * s % block, j * s % block
            canvas = torch.zeros([o + math.ceil(s / block) * block for o in (down, right)]).bool()
            canvas[down : down + s, right : right + s] = pair
            rows, cols = (side // block for side in canvas.shape)
            for row in range(rows):
                for col in range(cols):
                    tile = canvas[row * block :, col * block :][:block, :block]
                    column_density = tile.sum(0) / block
                    touched = (column_density > 0).sum()
                    if touched and (column_density > 1 / 3).sum() / touched > 0.6:
                        kept[i * s // block + row, j * s // block + col] = True
    kept = kept[:n, :n]
    if grid.video % block:
        kept[-1] = kept[:, -1] = True
    return kept


grids = st.builds(TokenGrid, st.integers(1, 12), st.integers(1, 7), st.integers(1, 7))
radials = st.builds(
    Radial,
    decay=st.sampled_from([0.2, 0.5, 0.95, 1.0, 1.7]),
    sink=st.booleans(),
    near=st.integers(1, 3),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, radials, st.sampled_from([2, 4, 8, 16]))
@example(TokenGrid(12, 5, 7), Radial(), 4)  # frames straddle blocks, the end is ragged
@example(TokenGrid(40, 1, 3), Radial(), 4)  # frames are skipped
def test_blocks_are_the_token_rule_reduced(grid, pattern, block):
    tokens = kept_tokens(grid, block, decay=pattern.decay, sink=pattern.sink, near=pattern.near)
    diagonal = torch.eye(math.ceil(grid.video / block), dtype=torch.bool)
    assert torch.equal(pattern.blocks(grid, block), reduce_pairs(tokens, grid, block) | diagonal)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, radials, st.sampled_from([2, 8, 128]), st.integers(0, 9))
def test_keep_is_the_token_rule_and_text_is_dense(grid, pattern, block, text):
    with_text = TokenGrid(grid.frames, grid.height, grid.width, text)
    token = torch.arange(len(with_text))
    kept = pattern.keep(with_text, token[:, None], token[None], block)
    video = kept_tokens(grid, block, decay=pattern.decay, sink=pattern.sink, near=pattern.near)
    assert torch.equal(kept[: grid.video, : grid.video], video)
    assert kept[grid.video :].all() and kept[:, grid.video :].all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, radials, st.sampled_from([2, 4, 16]))
def test_no_row_is_empty_and_the_diagonal_is_kept(grid, pattern, block):
    kept = pattern.blocks(grid, block)
    assert kept.shape == (math.ceil(grid.video / block),) * 2
    assert kept.diagonal().all()


def test_the_rule_alone_can_miss_the_diagonal():
    """Why `blocks` adds it: a query block must at least see itself."""
    grid = TokenGrid(8, 25, 40)
    tokens = kept_tokens(grid, 128, decay=1.0, sink=False, near=1)
    assert not reduce_pairs(tokens, grid, 128).diagonal().all()
    assert Radial(sink=False).blocks(grid, 128).diagonal().all()


def test_sink_adds_the_first_frame_and_nothing_else():
    grid = TokenGrid(32, 8, 8)  # a frame is 4 blocks
    without, with_sink = (Radial(sink=sink).blocks(grid, 16) for sink in (False, True))
    assert with_sink[:, :4].all()
    assert not without[:, :4].all()
    assert torch.equal(without[:, 4:], with_sink[:, 4:])


def test_near_keeps_whole_frames():
    grid, frame = TokenGrid(32, 8, 8), 4
    for near in (1, 2, 5):
        pairs = Radial(near=near, sink=False).blocks(grid, 16)
        whole = pairs.view(32, frame, 32, frame).all(3).all(1)
        distance = (torch.arange(32)[:, None] - torch.arange(32)[None]).abs()
        assert torch.equal(whole, distance <= near)


def test_small_frames_keep_their_neighbours():
    """The released code, with its fixed 128, keeps only the diagonal of frames under 128 tokens."""
    kept = Radial(sink=False).blocks(TokenGrid(16, 4, 4), 16)
    neighbours = torch.ones(15, dtype=torch.bool)
    assert torch.equal(kept.diagonal(1), neighbours) and torch.equal(kept.diagonal(-1), neighbours)
    assert not kept.all()


def test_windows_halve_as_the_distance_doubles():
    grid = TokenGrid(64, 32, 32)  # bit_length(1024) = 11
    windows = [Radial().window(grid, d, 16) for d in (1, 2, 4, 8, 16, 32)]
    assert windows == [1024, 512, 256, 128, 64, 32]
    assert Radial(decay=0.5).window(grid, 4, 16) == 128
    assert Radial(decay=0.5).window(grid, 1, 16) == 1024  # within `near` nothing is scaled
    assert [Radial().window(grid, d, 128) for d in (32, 33, 36)] == [128, -1, 128]


def test_density_falls_with_the_decay():
    grid = TokenGrid(16, 16, 16)
    densities = [build_layout(Radial(decay=decay), grid, 16).density for decay in (2, 1, 0.5, 0.2)]
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) == 4


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"decay": 0.0}, "decay=0.0 must be positive"),
        ({"decay": math.nan}, "decay=nan must be positive"),
        ({"near": 0}, "near=0 must be at least 1"),
        ({"rule": "cover"}, "rule='cover' is unknown; \"density\" is implemented"),
    ],
)
def test_impossible_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Radial(**wrong)


def test_patterns_by_name():
    assert pattern_name(Radial(decay=0.5)) == "radial"
    assert pattern_name(Dense()) == "dense"
    for name, cls in PATTERNS.items():
        assert isinstance(cls(), SparsePattern)
        assert pattern_name(cls()) == name
        assert cls() == cls() and hash(cls()) == hash(cls())  # a value: layouts are cached by it
    with pytest.raises(ValueError, match="object is not in PATTERNS: dense, radial"):
        pattern_name(object())


def test_dense_keeps_everything():
    grid, token = TokenGrid(3, 4, 5, text=2), torch.arange(62)
    assert Dense().keep(grid, token[:, None], token[None]).all()
    assert Dense().keep(grid, token[:, None], token[None]).shape == (62, 62)
    assert Dense().blocks(grid, 16).shape == (4, 4)
    assert Dense().blocks(grid, 16).all()
