"""The sizes of the experiment: `full` for one GPU, `tiny` for a CPU in minutes."""

from __future__ import annotations

from dataclasses import dataclass

from longreel.data.synthetic import SETS, Arena
from longreel.sparse.grid import TokenGrid


@dataclass(frozen=True)
class Scale:
    """Holds model, data and training sizes of one experiment; the rest follows from the cell.

    height, width: pixels. squeeze: pixels a side that become channels, in place of a VAE; a token
        is one such square. native: frames of pretraining.
    pretrain_*: of the base, dense. steps, batch, rank, lr: of each LoRA; full_lr: of fine-tuning
        all weights. clips: in each length's bank, which batches are drawn from.
    shift: of noise levels, in training and sampling, as Wan's at low resolution.
    samples: clips of each set that a cell is measured on. sample_steps: of the sampler.
    """

    name: str
    height: int
    width: int
    native: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    block: int
    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    clips: int
    steps: int
    batch: int
    rank: int
    lr: float
    full_lr: float
    samples: int
    sample_steps: int
    sample_batch: int
    squeeze: int = 4
    shift: float = 3.0
    warmup: int = 50
    text_dim: int = 64
    context: int = 12  # tokens to which a caption is padded
    freq: int = 256  # of the timestep's embedding

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return 3 * self.squeeze**2

    def frames(self, factor: int) -> int:
        return factor * (self.native - 1) + 1

    def arena(self, factor: int) -> Arena:
        return Arena(self.frames(factor), self.height, self.width, self.native)

    def grid(self, factor: int) -> TokenGrid:
        side = self.squeeze
        return TokenGrid(self.frames(factor), self.height // side, self.width // side)

    @property
    def parameters(self) -> int:
        """Count the parameters of the blocks, which are nearly all: two attentions and the MLP."""
        return self.layers * (8 * self.dim**2 + 2 * self.dim * self.ffn)


FULL = Scale(
    name="full",
    height=40,
    width=48,
    native=21,
    layers=10,
    heads=4,
    head_dim=64,
    ffn=1280,
    block=64,
    pretrain_steps=5000,
    pretrain_batch=48,
    pretrain_lr=8e-4,
    clips=6144,
    steps=500,
    batch=8,
    rank=32,
    lr=1e-3,
    full_lr=2e-4,
    samples=64,
    sample_steps=20,
    sample_batch=64,
)
TINY = Scale(
    name="tiny",
    height=24,
    width=24,
    native=9,
    layers=2,
    heads=1,
    head_dim=32,
    ffn=64,
    block=16,
    pretrain_steps=30,
    pretrain_batch=6,
    pretrain_lr=2e-3,
    clips=24,
    steps=3,
    batch=1,
    rank=4,
    lr=1e-3,
    full_lr=2e-4,
    samples=2,
    sample_steps=2,
    sample_batch=2,
    warmup=1,
    freq=32,
)
SCALES = {scale.name: scale for scale in (FULL, TINY)}
SET_NAMES = tuple(SETS)
