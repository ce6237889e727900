"""Radial against the paper's tables, a worked example and an independent token-level oracle."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import any_pair, reduce_pairs

from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import Radial

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


# What Eq. 4 taken literally drops of the same grids, token by token, with the first frame a sink:
# not what the paper prints, whose tables were computed with the released code.
EQ4 = [74.371, 84.229, 72.094, 82.736, 65.748]


@pytest.mark.parametrize("sizes, dropped", zip([s for s, _ in PAPER.values()], EQ4, strict=True))
def test_eq4_drops_less_than_the_tables_say(sizes, dropped):
    grid, pattern = TokenGrid(*sizes), Radial(rule="eq4")
    s, f = grid.per_frame, grid.frames
    kept = f * s * s  # the first frame
    for distance in range(f):
        reach = min(math.floor(pattern.window(grid, distance, 128)), s - 1)
        band = s * (2 * reach + 1) - reach * (reach + 1)
        before, after = f - 1 - distance, f - distance if distance else 0  # other than the first
        kept += band * (before + after)
    assert 100 * (1 - kept / grid.video**2) == pytest.approx(dropped, abs=1e-3)


def test_eq4_worked_example():
    grid, token = TokenGrid(8, 4, 4), torch.arange(128)
    for sink, kept in ((False, 11_680), (True, 12_448)):
        pattern = Radial(rule="eq4", sink=sink)
        assert pattern.keep(grid, token[:, None], token[None]).sum() == kept


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


def kept_by_eq4(grid, *, decay, sink, near):
    """bool [video, video]: Eq. 4 of the paper, condition by condition."""
    s = grid.per_frame
    token = torch.arange(grid.video)
    i, j, k, m = token[:, None] // s, token // s, token[:, None] % s, token % s
    distance = (i - j).abs()
    power = 2.0 ** torch.floor(torch.log2(distance.clamp(min=1).double()))
    share = torch.where(distance <= near, s, s / power * decay)
    band = ((power <= s) | (distance <= near)) & ((k - m).abs() + 1 <= share)
    skipped = (distance % torch.ceil(power / s) == 0) & (k == m)
    return band | skipped | (sink & (j == 0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, radials, st.sampled_from([4, 16, 32]))
@example(TokenGrid(40, 1, 3), Radial(), 16)  # frames are skipped, the others seen in one token
def test_eq4_and_touch_keep_blocks_with_any_kept_pair(grid, pattern, block):
    fields = {"decay": pattern.decay, "sink": pattern.sink, "near": pattern.near}
    code, paper = kept_tokens(grid, block, **fields), kept_by_eq4(grid, **fields)
    assert torch.equal(Radial(rule="touch", **fields).blocks(grid, block), any_pair(code, block))
    eq4, token = Radial(rule="eq4", **fields), torch.arange(grid.video)
    assert torch.equal(eq4.keep(grid, token[:, None], token[None], block), paper)
    assert torch.equal(eq4.blocks(grid, block), any_pair(paper, block))


def test_eq4_is_continuous_where_the_code_jumps():
    """One token more in a frame, 4,095 to 4,096, and the code's windows double."""
    below, above = TokenGrid(64, 63, 65), TokenGrid(64, 64, 64)
    code, paper = Radial(), Radial(rule="eq4")
    assert code.window(above, 8, 128) == 2 * code.window(below, 8, 128) == 512
    assert paper.window(above, 8, 128) == pytest.approx(paper.window(below, 8, 128), abs=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids, radials, st.sampled_from([2, 8, 128]), st.integers(0, 9))
def test_keep_is_the_token_rule_and_text_is_dense(grid, pattern, block, text):
    with_text = TokenGrid(grid.frames, grid.height, grid.width, text)
    token = torch.arange(len(with_text))
    kept = pattern.keep(with_text, token[:, None], token[None], block)
    video = kept_tokens(grid, block, decay=pattern.decay, sink=pattern.sink, near=pattern.near)
    assert torch.equal(kept[: grid.video, : grid.video], video)
    assert kept[grid.video :].all() and kept[:, grid.video :].all()


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


def test_widths_end_where_the_decay_changes_nothing_more():
    grid = TokenGrid(16, 16, 16)
    for rule in ("density", "touch", "eq4"):
        pattern = Radial(rule=rule)
        low, high = pattern.widths(grid, 16)
        for end, beyond in ((low, low / 2), (high, high * 2)):
            a, b = (pattern.with_width(w, grid, 16).blocks(grid, 16) for w in (end, beyond))
            assert torch.equal(a, b)
        assert pattern.with_width(high, grid, 16).blocks(grid, 16).all()
    assert Radial().widths(TokenGrid(2, 4, 4), 16) == (1.0, 1.0)  # no window beyond `near`


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"decay": 0.0}, "decay=0.0 must be positive"),
        ({"decay": math.nan}, "decay=nan must be positive"),
        ({"near": 0}, "near=0 must be at least 1"),
        ({"rule": "cover"}, "rule='cover' is unknown: take density, touch or eq4"),
    ],
)
def test_impossible_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Radial(**wrong)
