"""Harmonic series decay (HS), the alternative to which Radial Attention compares itself.

Li et al., NeurIPS 2025, arXiv 2506.19852, appendix D.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..grid import TokenGrid
from .rules import density, touch
from .windows import FrameWindows


@dataclass(frozen=True)
class Harmonic(FrameWindows):
    """A window in inverse proportion to the frame distance: s / d where Radial has s / 2^r.

    The appendix gives the width alone. The rest is taken as in Radial's released code: windows of
    at least one block, frames skipped where they would be thinner, the rules for blocks. That
    code's own windows are below s / 2^r unless s is a power of two, so that at equal decay this
    pattern often keeps more than Radial: compare the two at equal density.

    decay: scales every window beyond `near`.
    sink: all tokens attend to the whole first frame.
    near: frames at most this far apart attend to each other in full.
    rule: "density" keeps blocks that are mostly kept (`rules.density`), "touch" those any of whose
        token pairs is. The diagonal is always kept.
    """

    rule: Literal["density", "touch"] = "density"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("density", "touch"):
            raise ValueError(f"rule={self.rule!r} is unknown: take density or touch.")

    def share(self, grid: TokenGrid, distance: int) -> float:
        return grid.per_frame / distance

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        reduce = density if self.rule == "density" else touch
        return reduce(grid, block, self.windows(grid, block), self.sink)
