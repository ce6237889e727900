"""What Radial Attention and its relatives share: a window for each distance between frames."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import SparsePattern


@dataclass(frozen=True)
class FrameWindows(SparsePattern):
    """A token sees the raster positions within a window that depends on how far the frame is.

    decay: scales every window beyond `near`.
    sink: all tokens attend to the whole first frame.
    near: frames at most this far apart attend to each other in full.
    """

    width: ClassVar[str | None] = "decay"

    decay: float = 1.0
    sink: bool = True
    near: int = 1

    def __post_init__(self) -> None:
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive (1.0 is the paper's setting).")
        if self.near < 1:
            raise ValueError(f"near={self.near} must be at least 1: a frame and its neighbours.")

    @abstractmethod
    def share(self, grid: TokenGrid, distance: int) -> float:
        """Tokens either side that are seen of a frame `distance` >= 1 away, at `decay` 1."""

    def finest(self, block: int) -> int:
        """Tokens below which no window is narrowed."""
        return block

    def window(self, grid: TokenGrid, distance: int, block: int) -> float:
        """Largest raster distance kept between two frames `distance` apart; -1 if none is.

        A window is never thinner than a block; where it would be, it stays one block wide and
        frames are skipped instead. Radial Attention's released code hard-codes that threshold at
        128 tokens; here it is `block`, and neighbouring frames are never skipped, which only
        matters for frames under 256 tokens.
        """
        if distance <= self.near:
            return grid.per_frame
        share = self.share(grid, distance)
        if share < block and distance % int(block / share):
            return -1.0
        return min(max(share * self.decay, block), grid.per_frame)

    def windows(self, grid: TokenGrid, block: int) -> list[float]:
        """`window` at every distance of the grid."""
        return [self.window(grid, distance, block) for distance in range(grid.frames)]

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        reach = torch.tensor(self.windows(grid, block)).floor().long()
        s, video = grid.per_frame, grid.video
        text = (q >= video) | (kv >= video)
        distance = (q // s - kv // s).abs().clamp(max=grid.frames - 1)
        near = (q % s - kv % s).abs() <= reach[distance]
        return text | near | (self.sink & (kv < s))

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        """From every window beyond `near` at its narrowest to every window a whole frame.

        Frames that are skipped stay so: no decay brings the density down to 0 or up to 1.
        """
        shares = [self.share(grid, distance) for distance in range(self.near + 1, grid.frames)]
        if not shares:
            return 1.0, 1.0
        largest = grid.per_frame / min(shares)
        return min(self.finest(block) / max(shares), largest), largest
