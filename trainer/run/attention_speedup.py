"""Speedup of sparse attention over dense at the run's shape, measured before the run."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from ...sparse.attention import SparseAttention
from ...sparse.grid import TokenGrid
from ..memory.device import DENSE_BACKENDS

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Speedup:
    """Milliseconds of forward plus backward of one layer's attention, for the measured heads."""

    dense_ms: float
    sparse_ms: float

    @property
    def ratio(self) -> float:
        return self.dense_ms / self.sparse_ms

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x (dense {self.dense_ms:.1f} ms, sparse {self.sparse_ms:.1f} ms)"


def measure_speedup(
    attention: SparseAttention,
    grid: TokenGrid,
    *,
    layers: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 5,
) -> Speedup | str:
    """Time one sparse layer against dense SDPA, forward and backward, by turns; return medians.

    Returns a text if there is nothing to measure: on a CPU, which runs the oracle, or if all layers
    are dense. If all heads share one layout, four of them are timed: at lengths that matter they
    fill the GPU.
    """
    sparse_layer = next((i for i in range(layers) if not attention.is_dense(i)), None)
    if sparse_layer is None:
        return "n/a (dense)"
    if device.type != "cuda":
        return "n/a (oracle)"
    alike = len(set(attention.pattern.head_layouts(heads))) == 1
    shape = (1, len(grid), min(heads, 4) if alike else heads, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def dense() -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([*DENSE_BACKENDS], set_priority=True):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def sparse() -> Tensor:
        with attention.using(attention.planned(grid)):
            return attention.attention(sparse_layer, q, k, v)

    def step(attend: Callable[[], Tensor]) -> tuple[float]:
        elapsed, _ = milliseconds(lambda: torch.autograd.grad(attend(), (q, k, v), grad))
        return (elapsed,)

    medians = take_turns(
        {"dense": lambda: step(dense), "sparse": lambda: step(sparse)}, warmups=2, repeats=repeats
    )
    return Speedup(*medians["dense"], *medians["sparse"])


def milliseconds(function: Callable[[], Result]) -> tuple[float, Result]:
    """Return the GPU's milliseconds for `function`, by CUDA events, and its result."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def take_turns(
    steps: Mapping[Key, Callable[[], tuple[float, ...]]],
    *,
    warmups: int,
    repeats: int,
    seconds: float = 0.0,
) -> dict[Key, tuple[float, ...]]:
    """Run steps by turns; return the medians of the milliseconds that each one returns.

    After its warm-ups a step is repeated at least `repeats` times, and until its times add up to
    `seconds`. The order within a turn is random: at its power limit a GPU is slower after a step
    that heats it, so no step may always follow the same one.
    """
    draw = random.Random(0)
    times: dict[Key, list[tuple[float, ...]]] = {key: [] for key in steps}

    def due(key: Key) -> bool:
        counted = times[key][warmups:]
        return len(counted) < repeats or sum(map(sum, counted)) < 1e3 * seconds

    while turn := [key for key in steps if due(key)]:
        for key in draw.sample(turn, len(turn)):
            times[key].append(steps[key]())
    return {
        key: tuple(statistics.median(part) for part in zip(*taken[warmups:], strict=True))
        for key, taken in times.items()
    }
