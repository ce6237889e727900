"""Harmonic series decay (HS), the alternative that the Radial Attention paper compares with.

Li et al., NeurIPS 2025, arXiv 2506.19852, appendix D.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..grid import TokenGrid
from .rules import mostly_kept, touch
from .windows import FrameWindows


@dataclass(frozen=True)
class Harmonic(FrameWindows):
    """Narrows the window in inverse proportion to the frame distance: s / d, not Radial's s / 2^r.

    The appendix gives only the width. The rest follows Radial's released code: windows are at least
    one block, frames are skipped where they would be thinner, and the block rules are the same.
    That code's own windows are below s / 2^r unless s is a power of two, so at equal decay this
    pattern often keeps more than Radial: compare the two at equal density.

    decay: scales every window beyond `near`.
    sink: all tokens attend to the whole first frame.
    near: frames at most this far apart attend to each other in full.
    rule: "density" keeps blocks most of whose token pairs are kept (`rules.mostly_kept`), "touch"
        blocks with any kept pair. The diagonal is always kept.
    """

    rule: Literal["density", "touch"] = "density"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("density", "touch"):
            raise ValueError(f"rule={self.rule!r} is unknown: take density or touch.")

    def share(self, grid: TokenGrid, distance: int) -> float:
        return grid.per_frame / distance

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        reduce = mostly_kept if self.rule == "density" else touch
        return reduce(grid, block, self.windows(grid, block), self.sink)
