"""Shifted sparse attention of LongLoRA (Chen et al., ICLR 2024, arXiv 2309.12307)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import TokenGrid
from .base import SparsePattern


@dataclass(frozen=True)
class LongLora(SparsePattern):
    """Lets tokens attend within groups of consecutive tokens, shifted by half a group in half the
    heads.

    The first half of the heads cuts the video into groups of G tokens from its start, the second
    half into groups that begin G / 2 later (paper, section 3.2). The paper rolls the tokens around,
    so that its last shifted group joins the end to the start. Here that part is masked, as the
    paper's code does for causal models: the first and the last G / 2 tokens are groups of their
    own. With m whole groups the densities are 1 / m and (m - 0.5) / m^2.

    A group is an even number of blocks, so that all edges, shifted ones too, are block edges, and
    blocks keep exactly what tokens keep. `group` gives the rounded size. The last group may be
    shorter.

    share: tokens of a group as a share of the video (a quarter in the paper).
    """

    width: ClassVar[str | None] = "share"

    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1, the whole video.")

    def group(self, grid: TokenGrid, block: int) -> int:
        """Return the tokens of a group: `share` of the video, rounded to pairs of blocks.

        A group is at least two blocks, and at share 1 rounding never cuts it below the video.
        """
        if self.share == 1:
            return 2 * block * -(-grid.video // (2 * block))
        return 2 * block * max(1, int(grid.video * self.share / (2 * block) + 0.5))

    def note(self, grid: TokenGrid, block: int) -> str | None:
        """Return a sentence for the user if `share` was rounded, else None."""
        group, asked = self.group(grid, block), self.share * grid.video
        if group == asked:
            return None
        return (
            f"share={self.share} is {asked:.0f} of {grid.video} tokens; groups are {group} tokens, "
            f"a multiple of two blocks of {block}."
        )

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        group = self.group(grid, block)
        shift = group // 2 if layout else 0
        text = (q >= grid.video) | (kv >= grid.video)
        return text | ((q + shift) // group == (kv + shift) // group)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Return bool `[2, n, n]`: the plain layout, then the shifted one."""
        group = self.group(grid, block) // block
        index = torch.arange(-(-grid.video // block))
        ids = torch.stack([index // group, (index + group // 2) // group])
        return ids[:, :, None] == ids[:, None, :]

    def head_layouts(self, heads: int) -> list[int]:
        return [int(head >= heads // 2) for head in range(heads)]

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        return min(2 * block / grid.video, 1.0), 1.0
