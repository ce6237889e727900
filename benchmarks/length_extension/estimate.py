"""Estimate what the experiment takes on one H200 before it runs.

Rates are assumed, and are low: products of a model this narrow are bound by memory, sparse
blocks of 64 are half of what the kernels are tuned for, and element-wise passes take as long as
products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cells import Cell, solved
from .settings import SET_NAMES, Scale

PRODUCTS = 200e12  # FLOP/s of linear layers of this width
DENSE, SPARSE = 350e12, 200e12  # FLOP/s of attention, forward and backward together
BYTES = 3e12  # a second, of passes over activations
PASSES = 40  # over the activations of a layer in a forward, of 4 bytes a value
LAUNCH = 1.5e-3  # seconds per layer and forward that Python needs at least
BACKWARD = {"lora": 1.0, "full": 2.0}  # cost of a backward's products, in forwards
RENDERING = 15.0  # seconds for a length's bank of clips, on 16 processors
BESIDE = 6.0  # seconds per cell to load, compile and measure


@dataclass(frozen=True)
class Cost:
    """Holds the TFLOP and GPU seconds of one cell's training and sampling."""

    tflop: float
    train: float
    sample: float

    @property
    def seconds(self) -> float:
        return self.train + self.sample + BESIDE


def forward(
    scale: Scale, tokens: int, clips: int, density: float, dense_layers: int
) -> tuple[float, float, float, float]:
    """Return a forward's FLOP of products, dense and sparse attention, and its bytes."""
    linear = 2 * scale.layers * (6 * scale.dim**2 + 2 * scale.dim * scale.ffn) * tokens * clips
    pairs = 4.0 * tokens**2 * scale.dim * clips
    dense = scale.layers if density == 1 else dense_layers
    moved = PASSES * 4.0 * scale.layers * scale.dim * tokens * clips
    return linear, pairs * dense, pairs * density * (scale.layers - dense), moved


def step_seconds(parts: tuple[float, float, float, float], layers: int, backward: float) -> float:
    """Return a step's seconds; `backward` is the cost of its products in forwards, 0 for none."""
    linear, dense, sparse, moved = parts
    attention = dense / DENSE + sparse / SPARSE
    times = 3.5 if backward else 1.0
    compute = linear * (1 + backward) / PRODUCTS + attention * times
    compute += moved * (3 if backward else 1) / BYTES
    return max(compute, LAUNCH * layers * (2.5 if backward else 1))


def step_flop(parts: tuple[float, float, float, float], backward: float) -> float:
    linear, dense, sparse, _ = parts
    return linear * (1 + backward) + (dense + sparse) * (3.5 if backward else 1.0)


def cost(cell: Cell, scale: Scale) -> Cost:
    """Return the cost of one cell; one marked `seconds` shares the training of its run."""
    tokens, density = len(scale.grid(cell.factor)), solved(cell, scale)[1]
    flop = train = 0.0
    if cell.method != "none" and cell.mark == "steps":
        parts = forward(scale, tokens, scale.batch, density, cell.dense_layers)
        backward = BACKWARD[cell.method]
        train = scale.steps * step_seconds(parts, scale.layers, backward)
        flop = scale.steps * step_flop(parts, backward)
    parts = forward(scale, tokens, scale.sample_batch, density, cell.dense_layers)
    calls = len(SET_NAMES) * scale.sample_steps * scale.samples / scale.sample_batch
    sample = calls * step_seconds(parts, scale.layers, 0.0)
    return Cost((flop + calls * step_flop(parts, 0.0)) / 1e12, train, sample)


def pretraining(scale: Scale) -> Cost:
    parts = forward(scale, len(scale.grid(1)), scale.pretrain_batch, 1.0, 0)
    seconds = scale.pretrain_steps * step_seconds(parts, scale.layers, BACKWARD["full"])
    return Cost(scale.pretrain_steps * step_flop(parts, BACKWARD["full"]) / 1e12, seconds, 0.0)


def table(cells: Sequence[Cell], scale: Scale) -> str:
    """Return one line for pretraining and each cell, and the total; for `dry=true`."""
    lines = [f"{'cell':36} {'density':>8} {'PFLOP':>8} {'train s':>8} {'sample s':>8}"]
    base = pretraining(scale)
    lines.append(f"{'pretraining':36} {1:8.1%} {base.tflop / 1e3:8.2f} {base.train:8.0f} {0:8.0f}")
    total = base.seconds + RENDERING
    for cell in cells:
        taken, density = cost(cell, scale), solved(cell, scale)[1]
        lines.append(
            f"{cell.name:36} {density:8.1%} {taken.tflop / 1e3:8.2f} {taken.train:8.0f} "
            f"{taken.sample:8.0f}"
        )
        total += taken.seconds
    total += RENDERING * len({cell.factor for cell in cells if cell.method != "none"})
    lines.append(
        f"{len(cells)} cells, {scale.parameters / 1e6:.1f} M parameters in blocks: about "
        f"{total / 60:.0f} minutes of one H200, at assumed rates; seconds= of a call and the "
        "results that are there decide how they are split."
    )
    return "\n".join(lines)
