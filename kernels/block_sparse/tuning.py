"""Launch configurations per GPU, head size and element size, as data.

`HOPPER` holds measured choices for the kernels of the files hopper_*.py. `TABLE` holds tiles for
the portable kernels of forward.py and backward.py, which every other GPU runs; they fit its shared
memory without register spills. The offline compile tests check that for both.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pipeline:
    """The launch configuration of one Hopper kernel.

    tile: tokens of a tile that circulates in shared memory.
    slots: number of such tiles in a ring.
    registers: registers per thread of the second consumer group.
    producer_registers: registers per thread of the producer. The multiprocessor has 504 for one
        thread of each of the three groups together; the first consumer group gets the rest.
    """

    tile: int
    slots: int
    registers: int
    producer_registers: int


@dataclass(frozen=True)
class Pipelines:
    """The launches of a training step on Hopper.

    The backward is `fused`, or for deterministic gradients `grad_kv` and `grad_q`. The slots of
    `fused` are those of the queries; the output gradients have one slot less.
    """

    forward: Pipeline
    fused: Pipeline
    grad_kv: Pipeline
    grad_q: Pipeline


# Keyed by head_dim; bf16 and fp16 alike.
HOPPER = {
    64: Pipelines(
        forward=Pipeline(128, 2, 232, 40),
        fused=Pipeline(128, 3, 240, 24),
        grad_kv=Pipeline(64, 3, 240, 24),
        grad_q=Pipeline(64, 3, 232, 40),
    ),
    128: Pipelines(
        forward=Pipeline(128, 2, 232, 40),
        fused=Pipeline(64, 3, 240, 24),
        grad_kv=Pipeline(64, 3, 240, 24),
        grad_q=Pipeline(64, 3, 232, 40),
    ),
}
HOPPER_BLOCK = 128  # a program's rows are one block: two groups of 64


def hopper_takes(block: int, *tensors: Tensor) -> bool:
    """Return whether the Hopper kernels can compute from these [B, S, H, D] tensors.

    The copy engine needs 16-bit elements here, and every token aligned to 16 bytes.
    """
    return block == HOPPER_BLOCK and all(
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.shape[3] in HOPPER
        and x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and all(
            n == 1 or (s > 0 and s % 8 == 0)
            for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
        for x in tensors
    )


@dataclass(frozen=True)
class Tile:
    """The launch configuration of one portable kernel: a tile of `q` x `kv` tokens, with Triton's
    `num_warps` and `num_stages`."""

    q: int
    kv: int
    warps: int
    stages: int

    def within(self, block: int) -> "Tile":
        """Return this tile, cut down to divide a layout block of `block` tokens."""
        return replace(self, q=min(self.q, block), kv=min(self.kv, block))


@dataclass(frozen=True)
class Tiles:
    """The three launches of a training step with the portable kernels."""

    forward: Tile
    grad_kv: Tile
    grad_q: Tile


# Keyed by (architecture, largest head_dim, bytes per element).
TABLE = {
    # Blackwell, and Hopper where its own kernels do not apply: 227 KiB of shared memory.
    ("large", 64, 2): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("large", 128, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
    # A100: 163 KiB.
    ("ampere", 64, 2): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("ampere", 128, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    # GeForce and workstation cards: 99 KiB.
    ("small", 64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("small", 128, 2): Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
    # fp32 keeps its precision by plain multiply-adds, unrolled: for checks, not for speed.
    ("small", 64, 4): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("small", 128, 4): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
ARCHITECTURES = {(8, 0): "ampere", (9, 0): "large", (10, 0): "large", (10, 3): "large"}


@cache
def tiles_for(capability: tuple[int, int], head_dim: int, itemsize: int, block: int) -> Tiles:
    """Return the tiles for one compute capability, element size in bytes and layout block."""
    name = "small" if itemsize == 4 else ARCHITECTURES.get(capability, "small")
    tiles = TABLE[name, 64 if head_dim <= 64 else 128, itemsize]
    return Tiles(*(tile.within(block) for tile in (tiles.forward, tiles.grad_kv, tiles.grad_q)))


def choose(device: torch.device, head_dim: int, itemsize: int, block: int) -> Tiles:
    """Return the tiles for this device; on a CPU (Triton's interpreter) those that fit any GPU."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)
    return tiles_for(capability, head_dim, itemsize, block)
