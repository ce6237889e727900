"""Tile configurations per GPU, head size and element size, as data.

`TABLE` holds measured choices for Hopper (README.md) and, for the other architectures, tiles that
fit their shared memory without register spills; the offline compile tests hold both to that.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's launch: `q` x `kv` tokens a tile, and how Triton compiles it."""

    q: int
    kv: int
    warps: int
    stages: int
    tma: bool = False  # read and write through device-side tensor descriptors
    specialize: bool = False  # one warp group copies, the others compute (Hopper, 128 rows, `tma`)

    def within(self, block: int) -> "Tile":
        """This tile cut down to divide a layout block of `block` tokens."""
        if self.q <= block and self.kv <= block:
            return self
        # Specialized warps split 128 rows between two groups: a smaller tile runs without them.
        return replace(self, q=min(self.q, block), kv=min(self.kv, block), specialize=False)


@dataclass(frozen=True)
class Tiles:
    """The three launches of a training step."""

    forward: Tile
    grad_kv: Tile
    grad_q: Tile


# Keyed by (architecture, widest head_dim, bytes an element).
#
# Hopper's dK/dV does not use `specialize`, although that would take a tenth off the backward pass:
# within training steps at full width it has written NaN into one whole tile, in about one launch of
# forty (H200, Triton 3.6). Alone, in 140 launches under poisoned memory, it never did, and its
# barriers and buffers are in order by the generated code; until that is understood it reads by
# pointers.
TABLE = {
    ("hopper", 64, 2): Tiles(
        forward=Tile(64, 128, 4, 2, tma=True),
        grad_kv=Tile(64, 64, 4, 2),
        grad_q=Tile(64, 64, 4, 2, tma=True),
    ),
    ("hopper", 128, 2): Tiles(
        forward=Tile(128, 128, 4, 2, tma=True, specialize=True),
        grad_kv=Tile(64, 64, 4, 2),
        grad_q=Tile(128, 128, 4, 2, tma=True, specialize=True),
    ),
    # Blackwell, and Hopper where descriptors cannot read: 227 KiB of shared memory.
    ("pointers", 64, 2): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("pointers", 128, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
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
# Where flash-attn-4 was measured faster than these kernels, forward and backward together: (compute
# capability, head_dim). The backend "auto" is "fa4" there. Empty until measured.
FA4_IS_FASTER: frozenset[tuple[tuple[int, int], int]] = frozenset()
ARCHITECTURES = {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "pointers", (10, 3): "pointers"}


@cache
def tiles_for(
    capability: tuple[int, int], head_dim: int, itemsize: int, block: int, aligned: bool
) -> Tiles:
    """The tiles of one compute capability; `choose` says what the rest is."""
    name = ARCHITECTURES.get(capability, "small")
    if itemsize == 4:
        name = "small"
    elif name == "hopper" and not aligned:
        name = "pointers"
    tiles = TABLE[name, 64 if head_dim <= 64 else 128, itemsize]
    return Tiles(*(tile.within(block) for tile in (tiles.forward, tiles.grad_kv, tiles.grad_q)))


def choose(device: torch.device, head_dim: int, itemsize: int, block: int, aligned: bool) -> Tiles:
    """The tiles for this device; on a CPU (Triton's interpreter) those that any GPU could run.

    `aligned` says whether tensor descriptors can read the inputs.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)
    return tiles_for(capability, head_dim, itemsize, block, aligned)
