"""A picture of a block layout."""

from __future__ import annotations

import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .layout import BlockLayout

MOST_PIXELS = 1200  # a side of the drawn matrix


def draw_layout(layout: BlockLayout, title: str) -> Figure:
    """The kept blocks: queries down, keys across, dark where attention is computed.

    With more blocks than pixels, blocks are averaged: thin bands turn pale but stay visible.
    """
    kept = layout.to_dense().float()
    side = min(layout.rows, MOST_PIXELS)
    image = F.adaptive_avg_pool2d(kept[:, None], side)[:, 0].amax(0)
    figure = Figure(figsize=(7, 7.4), dpi=180)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    extent = (0, layout.rows, layout.rows, 0)
    axes.imshow(image, cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"key block ({layout.block} tokens)")
    axes.set_ylabel("query block")
    figure.tight_layout()
    return figure
