"""`FrameWindows`, the base of Radial Attention and its relatives: a window per frame distance."""

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
    """Lets a token see the raster positions within a window that depends on the frame distance.

    decay: factor of every window beyond `near`.
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
        """Return the tokens seen on either side in a frame `distance` >= 1 away, at `decay` 1."""

    def finest(self, block: int) -> int:
        """Return the number of tokens below which no window is narrowed."""
        return block

    def window(self, grid: TokenGrid, distance: int, block: int) -> float:
        """Return the largest raster distance kept between frames `distance` apart; -1 for none.

        A window is never thinner than a block; where it would be, it stays one block wide and
        frames are skipped instead. Radial Attention's released code hard-codes that threshold at
        128 tokens. Here it is `block`, and neighbouring frames are never skipped, which makes a
        difference only for frames of fewer than 256 tokens.
        """
        if distance <= self.near:
            return grid.per_frame
        share = self.share(grid, distance)
        if share < block and distance % int(block / share):
            return -1.0
        return min(max(share * self.decay, block), grid.per_frame)

    def windows(self, grid: TokenGrid, block: int) -> list[float]:
        """Return `window` at every frame distance of the grid."""
        return [self.window(grid, distance, block) for distance in range(grid.frames)]

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        limits = torch.tensor(self.windows(grid, block)).floor().long()
        s, video = grid.per_frame, grid.video
        text = (q >= video) | (kv >= video)
        distance = (q // s - kv // s).abs().clamp(max=grid.frames - 1)
        near = (q % s - kv % s).abs() <= limits[distance]
        return text | near | (self.sink & (kv < s))

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        """Return the decays at which all windows beyond `near` are narrowest and whole frames.

        Skipped frames stay skipped, so no decay brings the density down to 0 or up to 1.
        """
        shares = [self.share(grid, distance) for distance in range(self.near + 1, grid.frames)]
        if not shares:
            return 1.0, 1.0
        largest = grid.per_frame / min(shares)
        return min(self.finest(block) / max(shares), largest), largest
