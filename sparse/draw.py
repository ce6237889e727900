"""Draw the blocks and token pairs that a pattern computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from .grid import TokenGrid
from .layout import BlockLayout, build_layout
from .patterns import SparsePattern

MOST_PIXELS = 1200  # width of all matrices side by side, and so of a single one
MOST_LAYOUTS = 4  # only the first layouts are drawn
MOST_FRAMES = 144  # of the keep region; of a longer video frames are skipped evenly
DPI = 100
MARGIN, TITLE, CURVE = 80, 90, 260  # pixels


def draw_pattern(
    pattern: SparsePattern, grid: TokenGrid, block: int, title: str, heads: int | None = None
) -> Figure:
    """Draw what `pattern` computes on `grid`, one column per layout.

    From top to bottom a column shows the kept blocks, queries down and keys across, and the video
    tokens that the centre token attends to, frame by frame (dark: kept by the pattern itself, pale:
    added by its blocks). Below all columns stands the computed share of token pairs by the distance
    of their frames.

    heads: number of heads, to draw only the layouts that some head uses; None draws all.
    """
    layout = build_layout(pattern, grid, block)
    used = range(layout.layouts) if heads is None else sorted(set(pattern.head_layouts(heads)))
    drawn = list(used)[:MOST_LAYOUTS]
    side = max(MOST_PIXELS // len(drawn), 480)
    montage = _Montage.of(grid, side)
    width = len(drawn) * (side + MARGIN) + MARGIN
    height = TITLE + side + MARGIN + montage.height + MARGIN + CURVE + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, y=1 - 12 / height, va="top", wrap=True)

    def axes(left: int, top: int, wide: int, high: int) -> Axes:
        """Add axes placed in pixels from the upper left corner, so that no image is resampled."""
        bottom = height - top - high
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    dense = layout.to_dense()
    for place, index in enumerate(drawn):
        left = MARGIN + place * (side + MARGIN)
        name = f"layout {index}: " if layout.layouts > 1 else ""
        _draw_blocks(axes(left, TITLE, side, side), dense[index], block, name)
        below = axes(left, TITLE + side + MARGIN, montage.width, montage.height)
        executed, kept = _executed(layout, dense, index, grid), _kept(pattern, grid, block, index)
        _draw_region(below, executed, kept, grid, montage)
    top = TITLE + side + MARGIN + montage.height + MARGIN
    curve = axes(MARGIN, top, width - 2 * MARGIN, CURVE)
    for index in drawn:
        shares = frame_density(layout, grid, index)
        curve.plot(range(grid.frames), shares, label=f"layout {index}", marker=".", markersize=3)
    curve.set_xlabel("distance of two frames")
    curve.set_ylabel("computed share of pairs")
    curve.set_ylim(-0.02, 1.05)
    if len(drawn) > 1:
        curve.legend(loc="upper right")
    return figure


def frame_density(layout: BlockLayout, grid: TokenGrid, index: int = 0) -> list[float]:
    """Return the computed share of video token pairs of one layout, by their frames' distance."""
    block_of = _block_of(layout, index, grid)
    frame = torch.arange(grid.video) // grid.per_frame
    held = torch.zeros(
        layout.rows, grid.frames, dtype=torch.float64
    )  # tokens of each frame in each block
    held.index_put_((block_of, frame), torch.ones((), dtype=torch.float64), accumulate=True)
    # Sums of tokens of one frame are exact in fp32, which takes half the memory of fp64.
    keys = layout.to_dense()[index].float() @ held.float()
    pairs = held.T @ keys.double() / grid.per_frame**2
    return [
        (pairs.diagonal(d).mean().item() + pairs.diagonal(-d).mean().item()) / 2
        for d in range(grid.frames)
    ]


def _block_of(layout: BlockLayout, index: int, grid: TokenGrid) -> Tensor:
    """Return the block of each video token, `[video]`."""
    if layout.inverse is None:
        return torch.arange(grid.video) // layout.block
    return layout.inverse[index, : grid.video].long() // layout.block


def _executed(layout: BlockLayout, dense: Tensor, index: int, grid: TokenGrid) -> Tensor:
    """Return which video tokens the centre token attends to through blocks, bool `[video]`."""
    block_of = _block_of(layout, index, grid)
    return dense[index, block_of[_centre(grid)]][block_of]


def _kept(pattern: SparsePattern, grid: TokenGrid, block: int, index: int) -> Tensor:
    """Return which video tokens the pattern itself keeps for the centre token, bool `[video]`."""
    token = torch.arange(grid.video)
    return pattern.keep(grid, torch.tensor(_centre(grid)), token, block, index)


def _centre(grid: TokenGrid) -> int:
    row = grid.frames // 2 * grid.height + grid.height // 2
    return row * grid.width + grid.width // 2


def _draw_blocks(axes: Axes, kept: Tensor, block: int, name: str) -> None:
    """Draw one block matrix.

    Where there are more blocks than pixels they are averaged; the colour scale keeps thin bands
    visible.
    """
    rows, share = len(kept), kept.double().mean().item()
    pixels = min(rows, round(axes.bbox.width))
    image = F.adaptive_avg_pool2d(kept.float()[None], pixels)[0]
    axes.imshow(
        image,
        cmap="Blues",
        norm=PowerNorm(0.5, 0, 1),
        extent=(0, rows, rows, 0),
        interpolation="nearest",
    )
    axes.set_title(f"{name}{share:.1%} of {rows} x {rows} blocks of {block} tokens", fontsize=9)
    axes.set_xlabel("key block")
    axes.set_ylabel("query block")


@dataclass(frozen=True)
class _Montage:
    """The arrangement of frames, left to right, then down.

    Every token gets the same whole number of pixels, and the gap between frames is one token wide.
    """

    frames: list[int]
    columns: int
    width: int  # pixels
    height: int

    @classmethod
    def of(cls, grid: TokenGrid, most: int) -> _Montage:
        """Arrange frames about twice as wide as high, in at most `most` pixels of width unless a
        single frame is wider."""
        stride = math.ceil(grid.frames / MOST_FRAMES)
        frames = list(
            range(grid.frames // 2 % stride, grid.frames, stride)
        )  # including the centre's
        wide, high = grid.width + 1, grid.height + 1
        columns = math.ceil(math.sqrt(2 * len(frames) * high / wide))
        columns = max(1, min(columns, len(frames), most // wide))
        zoom = max(1, most // (columns * wide))
        lines = math.ceil(len(frames) / columns)
        return cls(frames, columns, columns * wide * zoom, lines * high * zoom)


def _draw_region(
    axes: Axes, executed: Tensor, kept: Tensor, grid: TokenGrid, montage: _Montage
) -> None:
    frames, columns = montage.frames, montage.columns
    value = executed.float() + 2 * kept.float()
    tiles = F.pad(value.view(grid.frames, grid.height, grid.width)[frames], (0, 1, 0, 1), value=4)
    lines = math.ceil(len(frames) / columns)
    missing = tiles.new_full((lines * columns - len(frames), *tiles.shape[1:]), 4)
    image = torch.cat([tiles, missing]).view(lines, columns, *tiles.shape[1:])
    # Values: 0 neither, 1 blocks only, 2 pattern only, 3 both, 4 the gap between frames.
    colours = ListedColormap(["white", "#9ecae1", "#fdae6b", "#08519c", "0.8"])
    flat = image.permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2)
    axes.imshow(flat, cmap=colours, vmin=0, vmax=4, aspect="auto", interpolation="nearest")
    down, across = divmod(frames.index(grid.frames // 2), columns)
    x, y = across * (grid.width + 1) + grid.width // 2, down * (grid.height + 1) + grid.height // 2
    axes.plot([x], [y], "o", color="#d62728", fillstyle="none", markersize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    part = "" if len(frames) == grid.frames else f", {len(frames)} of {grid.frames} drawn"
    axes.set_title(
        f"keys of the centre token, frame after frame{part}\n"
        "(dark: kept and computed; pale: added by blocks; orange: dropped by blocks)",
        fontsize=8,
    )
