"""The operations and seconds of a step or of one forward, computed from an `Anatomy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ...sparse.grid import TokenGrid
from . import rates
from .anatomy import Anatomy
from .estimate import Knobs, base_bytes, kept_by_forward, training_memory
from .rates import Gpu


@dataclass(frozen=True)
class Flops:
    """Operations of a step or of one forward.

    attention: 4 x heads x head_dim per kept token pair in a forward, 2.5 times that in a backward.
    dense_attention: the same if all pairs were kept. matmul: linear layers of the frozen base,
    whose backward needs only gradients of the inputs, and cross-attention, whose keys are few.
    lora: the adapter's products. elementwise: bytes moved, not operations.
    """

    attention: float
    dense_attention: float
    matmul: float
    lora: float
    elementwise: float

    @property
    def total(self) -> float:
        return self.attention + self.matmul + self.lora

    @property
    def dense_total(self) -> float:
        return self.total - self.attention + self.dense_attention


@dataclass(frozen=True)
class Seconds:
    """Seconds of a step or of one forward, by part.

    offload: transfers to the host that no computation hides. exchange: all transfers between GPUs
    that share samples.
    """

    attention: float
    matmul: float
    lora: float
    elementwise: float
    offload: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def plus(self, other: Seconds) -> Seconds:
        return Seconds(
            **{p.name: getattr(self, p.name) + getattr(other, p.name) for p in fields(self)}
        )

    def times(self, factor: float) -> Seconds:
        return Seconds(**{part.name: factor * getattr(self, part.name) for part in fields(self)})


@dataclass(frozen=True)
class Passes:
    """Counts how often a step computes a block's forward, its backward and its attention."""

    forward: float
    backward: float
    attention_forward: float

    @classmethod
    def of_training(cls, knobs: Knobs) -> Passes:
        recomputed = knobs.recompute != "none"
        return cls(1 + recomputed, 1, 1 + (knobs.recompute == "all"))


SAMPLING = Passes(1, 0, 1)


def work(
    model: Anatomy,
    grid: TokenGrid,
    densities: Sequence[float],
    knobs: Knobs,
    passes: Passes,
    batch: int = 1,
) -> Flops:
    """Count the operations of `passes` over `batch` samples.

    densities: kept share of the token pairs, by layer.
    """
    pairs = 4 * len(grid) ** 2 * model.width * batch
    attention = pairs * (passes.attention_forward + 2.5 * passes.backward)
    linear = passes.forward + passes.backward
    matmul = lora = elementwise = 0.0
    text = grid.text or model.context_tokens
    for block in model.blocks:
        weights = block.video * grid.video + block.text * text + block.joint * len(grid)
        matmul += 2 * weights * linear
        if block.cross:
            crossing = passes.forward + 2.5 * passes.backward
            matmul += 4 * grid.video * model.context_tokens * block.width * crossing
        tokens = len(grid) if block.joint else grid.video
        lora += 2 * block.lora * tokens * (passes.forward + 2 * passes.backward)
        kept = sum(kept_by_forward(model, block, knobs).values()) * len(grid)
        elementwise += rates.ELEMENTWISE_MOVES * kept * (passes.forward + 2 * passes.backward)
    return Flops(
        attention=attention * sum(densities),
        dense_attention=attention * len(densities),
        matmul=batch * matmul,
        lora=batch * lora,
        elementwise=batch * elementwise,
    )


def seconds(
    model: Anatomy,
    grid: TokenGrid,
    densities: Sequence[float],
    knobs: Knobs,
    gpu: Gpu,
    passes: Passes,
    *,
    batch: int = 1,
    backend: str = "auto",
) -> Seconds:
    """Predict the seconds of `passes` over `batch` samples on `gpu`.

    densities: kept share of the token pairs, by layer. `rates` says what is measured.
    """
    flops = work(model, grid, densities, knobs, passes, batch)
    kernel = backend if backend in rates.ATTENTION else "triton"
    sparse, dense = (rates.attention_rate(gpu, name, len(grid)) for name in (kernel, "dense"))
    pairs = 4 * len(grid) ** 2 * model.width * batch
    attention = 0.0
    for density in densities:
        rate = dense if density == 1 else sparse
        times = passes.attention_forward / rate.forward + 2.5 * passes.backward / rate.backward
        attention += density * pairs * times / 1e12
    in_fp32 = knobs.lora_dtype == "float32"
    lora_rate = gpu.fp32 * rates.FP32_SHARE if in_fp32 else rates.matmul_rate(gpu)
    parts = Seconds(
        attention,
        flops.matmul / (1e12 * rates.matmul_rate(gpu)),
        flops.lora / (1e12 * lora_rate),
        flops.elementwise / (1e12 * gpu.bandwidth * rates.BANDWIDTH_SHARE),
    )
    sent = exchanged_bytes(model, batch * len(grid), knobs, passes)
    exchange = sent / (1e9 * gpu.peer * rates.LINK_SHARE)
    shared = replace(parts.times(1 / knobs.sequence), exchange=exchange)
    if not (knobs.offload and passes.backward):
        return shared
    moved = training_memory(model, batch * len(grid), knobs).host.get("offload", 0.0)
    transfer = moved / (1e9 * gpu.link * rates.LINK_SHARE)
    # Copied out during the forward and back during the rest, which takes longer.
    forward = shared.total / (passes.forward + 2 * passes.backward)
    return replace(shared, offload=max(0.0, transfer - forward))


def exchanged_bytes(model: Anatomy, tokens: int, knobs: Knobs, passes: Passes) -> float:
    """Return the bytes that each GPU sends to those that share its batch of `tokens`.

    In every block the queries, keys, values and attention outputs of its tokens are exchanged once
    in a forward, and their gradients once in a backward, except for the GPU's own heads.
    """
    width = sum(block.width for block in model.blocks)
    leaving = tokens / knobs.sequence * (1 - 1 / knobs.sequence)
    return 4 * knobs.act * width * leaving * (passes.forward + passes.backward)


def sharding_bytes(model: Anatomy, knobs: Knobs, passes: Passes) -> float:
    """Return the bytes of a sharded base that a GPU receives in a batch's forward and backward.

    Blocks are gathered once for each; a recomputed forward belongs to the backward.
    """
    arriving = base_bytes(model, knobs) * (1 - 1 / knobs.base_shards)
    return arriving * (1 + passes.backward)
