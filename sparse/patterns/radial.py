"""Radial Attention (Li et al., NeurIPS 2025, arXiv 2506.19852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..grid import TokenGrid
from .rules import mostly_kept, touch
from .windows import FrameWindows


@dataclass(frozen=True)
class Radial(FrameWindows):
    """Lets a token see fewer positions of a frame the further away that frame is.

    At frame distance d a token attends to the raster positions within a window that halves each
    time d doubles, so cost grows as n log n. `rule` decides the exact window and the blocks:

    "density": the authors' released code, with which the paper's tables were computed. Octaves are
        powers of two (`bit_length`), so the window doubles each time a frame's token count passes a
        power of two. Once it would be thinner than a block it stays one block wide and frames are
        skipped. A block is kept when most of it is (`rules.mostly_kept`).
    "touch": the same window; a block is kept when any of its token pairs is.
    "eq4": section 3.2, Eq. 4 of the paper, continuous in the frame size: |k - l| + 1 <= s / 2^r
        with r = floor(log2 d); once that is under one token, only the same position in every
        ceil(2^r / s)-th frame. A block is kept when any of its token pairs is.

    The diagonal is always kept.

    decay: scales every window beyond `near` (1 in the paper's tables).
    sink: all tokens attend to the whole first frame (paper, appendix A.1).
    near: frames at most this far apart attend to each other in full.
    """

    rule: Literal["density", "touch", "eq4"] = "density"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("density", "touch", "eq4"):
            raise ValueError(f"rule={self.rule!r} is unknown: take density, touch or eq4.")

    def share(self, grid: TokenGrid, distance: int) -> float:
        if self.rule == "eq4":
            return grid.per_frame / _octave(distance)
        return 2.0 ** (grid.per_frame.bit_length() - distance.bit_length())

    def finest(self, block: int) -> int:
        return 1 if self.rule == "eq4" else block

    def window(self, grid: TokenGrid, distance: int, block: int) -> float:
        if self.rule != "eq4" or distance <= self.near:
            return super().window(grid, distance, block)
        if distance % -(-_octave(distance) // grid.per_frame):
            return -1.0
        window = self.share(grid, distance) * self.decay - 1
        return min(max(window, 0.0), grid.per_frame)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        reduce = mostly_kept if self.rule == "density" else touch
        return reduce(grid, block, self.windows(grid, block), self.sink)


def _octave(distance: int) -> int:
    """Return the largest power of two up to `distance`: the paper's 2^r."""
    return 1 << (distance.bit_length() - 1)
