"""Say where sequence parallelism cuts Wan."""

from __future__ import annotations

from torch import Tensor

from ..split import SequenceSplit


class WanSplit(SequenceSplit):
    def cut(self, embedded: Tensor, part: slice, tokens: int) -> Tensor:
        return embedded.flatten(2)[:, :, part, None, None]  # of [B, C, f, h, w]
