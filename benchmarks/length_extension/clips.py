"""The clips that are trained on: drawn once a length, the same for every cell."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longreel.data.coherence import measure
from longreel.data.synthetic import Source

from .settings import Scale

TRAINED, PRETRAINED = 1, 2  # seeds of the banks: a LoRA meets no clip that its base has seen
FEW = 64  # clips below which starting processes costs more than it saves


class Bank:
    """All clips of a length, uint8 `[N, T, H, W, 3]` on the device, with their captions."""

    def __init__(self, scale: Scale, factor: int, seed: int, device: torch.device) -> None:
        self.source = Source("mix", scale.arena(factor), seed)
        clips = in_processes(self.source.clip, range(scale.clips))
        self.pixels = torch.from_numpy(np.stack(clips)).to(device)
        self.captions = [self.source.caption(index) for index in range(scale.clips)]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        chosen = torch.tensor(indices, device=self.pixels.device)
        return self.pixels[chosen], [self.captions[index] for index in indices]


def measure_all(name: str, clips: np.ndarray, native: int) -> list[dict[str, float]]:
    """`coherence.measure` of each clip, on all processors."""
    return in_processes(partial(_measure, name, native), list(clips))


def in_processes(function, items: Sequence) -> list:
    """`[function(item) for item in items]`, by as many processes as there are processors.

    Spawned: a process that has used a GPU must not be forked.
    """
    workers = min(os.cpu_count() or 1, 16)
    if len(items) < FEW or workers == 1:
        return [function(item) for item in items]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(function, items, chunksize=-(-len(items) // (4 * workers))))


def _measure(name: str, native: int, clip: np.ndarray) -> dict[str, float]:
    return measure(name, clip, native)
