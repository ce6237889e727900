"""The clips that are trained on: drawn once a length, the same for every cell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longreel.data.synthetic import ClipSet

from .settings import Scale
from .workers import Workers

TRAINED, PRETRAINED = 1, 2  # seeds of the banks: a LoRA sees no clip that its base was trained on


class Bank:
    """Holds all clips of a length, uint8 `[N, T, H, W, 3]` on the device, with their captions."""

    def __init__(
        self, scale: Scale, factor: int, seed: int, device: torch.device, workers: Workers
    ) -> None:
        self.source = ClipSet("mix", scale.arena(factor), seed)
        clips = workers.map(self.source.clip, range(scale.clips))
        self.pixels = torch.from_numpy(np.stack(clips)).to(device)
        self.captions = [self.source.caption(index) for index in range(scale.clips)]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        chosen = torch.tensor(indices, device=self.pixels.device)
        return self.pixels[chosen], [self.captions[index] for index in indices]
