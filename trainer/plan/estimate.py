"""The arithmetic of a plan: bytes, operations and seconds of one step, from an `Anatomy`.

Memory counts tensors as the stock blocks keep them for backward; `rates.CALIBRATION` says how far
that has been checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...sparse.grid import TokenGrid
from ..config.schema import Config
from ..job import Job
from . import rates
from .anatomy import Anatomy, Block
from .rates import Gpu

GIB = 2**30
BYTES = {"bfloat16": 2, "float32": 4, "float8": 1}


@dataclass(frozen=True)
class Knobs:
    """The settings of `config.Memory` that decide how much there is; lora_dtype: of the adapter's
    products; `parallel.sequence`: the GPUs that share the tokens of one sample; `parallel.engine`,
    and gpus: of the run, over which it shards.
    """

    recompute: str = "all"
    offload: bool = False
    offload_keep: int = 1
    mlp_chunk: int = 0
    base_dtype: str = "bfloat16"
    optimizer: str = "adamw"
    lora_dtype: str = "float32"
    sequence: int = 1
    engine: str = "ddp"
    gpus: int = 1

    @property
    def base_shards(self) -> int:
        """GPUs that the frozen base is in shards over."""
        return self.gpus if self.engine in ("zero3", "fsdp2") else 1

    @property
    def act(self) -> int:
        """Bytes of a number that blocks pass on."""
        return 4 if self.base_dtype == "float32" else 2


def read_knobs(config: Config, gpus: int | None = None) -> Knobs:
    """gpus: of the run; None for those that share one sample."""
    elsewhere: dict[str, Any] = {
        "lora_dtype": config.lora.compute_dtype,
        "optimizer": config.train.optimizer,
        "sequence": config.parallel.sequence,
        "engine": config.parallel.engine or "ddp",
        "gpus": config.parallel.sequence if gpus is None else gpus,
    }
    names = [part.name for part in fields(Knobs) if part.name not in elsewhere]
    return Knobs(**{name: getattr(config.memory, name) for name in names}, **elsewhere)


@dataclass(frozen=True)
class MemoryUse:
    """Peak bytes: of one GPU by part; of its process's host memory by stages, one after another."""

    gpu: dict[str, float]
    host: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_peak(self) -> float:
        return max(self.host.values())

    @property
    def fixed(self) -> float:
        """Of the GPU, what no length and no knob but `base_dtype` and `lora.rank` changes."""
        return sum(self.gpu[part] for part in ("frozen base", "LoRA, gradients, moments"))


def training_memory(model: Anatomy, tokens: int, knobs: Knobs) -> MemoryUse:
    """A step's peak: in the backward of the block that needs most, with all inputs still kept.

    tokens: of a whole batch, text included. Where GPUs share samples each counts an equal part,
        though it has all of the text.
    """
    tokens = -(-tokens // knobs.sequence)
    inputs = [_kept_by_checkpoint(model, block, knobs) * tokens for block in model.blocks]
    parts = {block: _block_parts(model, block, tokens, knobs) for block in set(model.blocks)}
    if knobs.recompute == "none":
        kept = {b: sum(_kept(model, b, tokens, knobs).values()) for b in set(model.blocks)}
        inputs = [kept[block] * tokens for block in model.blocks]
    gpu_inputs, host_inputs = sum(inputs), 0.0
    if knobs.offload:
        # The last ones, and two blocks' on their way.
        resident = min(len(inputs), knobs.offload_keep + 2)
        gpu_inputs = sum(inputs[len(inputs) - resident :])
        host_inputs = sum(inputs[: max(0, len(inputs) - knobs.offload_keep)])
    working = max(parts.values(), key=lambda by_part: sum(by_part.values()))
    if knobs.recompute == "none":
        working = {"gradients": working["gradients"]}
    gpu = {
        "frozen base": base_bytes(model, knobs) / knobs.base_shards,
        "LoRA, gradients, moments": adapter_bytes(model, knobs),
        **({"gathered": gathered_bytes(model, knobs)} if knobs.base_shards > 1 else {}),
        "kept by blocks" if knobs.recompute == "none" else "block inputs": gpu_inputs,
        **{f"one block: {part}": size for part, size in working.items()},
        "positions": model.rope * tokens,
        "reserve": rates.RESERVE * GIB,
    }
    host = {"weights while loading": model.params * knobs.act, "offload": host_inputs}
    return MemoryUse(gpu, {part: size for part, size in host.items() if size})


def adapter_bytes(model: Anatomy, knobs: Knobs) -> float:
    """Of the adapter on one GPU, with its gradients and moments, all fp32 or of 8 bits. ZeRO has a
    further copy of the parameters, in shards, that its optimizer updates."""
    moments = 2 if knobs.optimizer == "adamw8bit" else 8
    if knobs.engine == "fsdp2":
        return model.lora * (4 + 4 + moments) / knobs.gpus
    if knobs.engine == "zero3":
        return model.lora * (4 + 4 + 4 + moments) / knobs.gpus
    if knobs.engine == "zero2":
        return model.lora * (4 + 4 + (4 + moments) / knobs.gpus)
    return model.lora * (4 + 4 + moments)


def gathered_bytes(model: Anatomy, knobs: Knobs) -> float:
    """What a sharded base has whole: two blocks, one of them on its way, and what is in none."""
    each = base_bytes(model, knobs) / model.params
    largest = max(block.params for block in model.blocks)
    return each * (2 * largest + model.params - sum(block.params for block in model.blocks))


def sharding_bytes(model: Anatomy, knobs: Knobs, passes: Passes) -> float:
    """What a GPU receives of a sharded base in a batch's forward and in its backward, which begins
    with the recomputed forward where there is one."""
    arriving = base_bytes(model, knobs) * (1 - 1 / knobs.base_shards)
    return arriving * (1 + passes.backward)


def base_bytes(model: Anatomy, knobs: Knobs) -> float:
    """The frozen weights; at float8 those of the blocks, and one layer at a time in bf16.

    The few that diffusers keeps in fp32 (Wan's norms and timestep embedding) count as the rest.
    """
    if knobs.base_dtype != "float8":
        return model.params * BYTES[knobs.base_dtype]
    blocks = sum(block.params for block in model.blocks)
    largest = max(b.width * (b.mlp * (1 + b.gated) + b.width * b.fused) for b in model.blocks)
    return blocks * BYTES["float8"] + (model.params - blocks + largest) * BYTES["bfloat16"]


def _kept_by_checkpoint(model: Anatomy, block: Block, knobs: Knobs) -> int:
    """Bytes a token: the block's input, and with `attention` its result and log-sum-exp."""
    attention = knobs.act * block.width + 4 * model.heads
    return knobs.act * block.width + attention * (knobs.recompute == "all_but_attention")


def kept_by_forward(model: Anatomy, block: Block, knobs: Knobs) -> dict[str, float]:
    """Bytes a token, by part, that a block's forward keeps for its backward."""
    act, width = knobs.act, block.width
    kept: dict[str, float] = {
        "norms": act / 2 * (block.norms + block.qk_norms),
        "qkv": 3 * act * width,
        "LoRA inputs": _lora_inputs(model, block, knobs),
        "attention out, lse": act * width + 4 * model.heads,
        # SwiGLU keeps gate, value and the gate's silu; GELU its input.
        "MLP": act * block.mlp * (3 if block.gated else 1),
    }
    if block.cross:
        kept["cross-attention"] = 2 * act * width
    return kept


def _lora_inputs(model: Anatomy, block: Block, knobs: Knobs) -> float:
    """Bytes a token: PEFT hands each adapted layer its input in the adapter's fp32, in a copy of
    its own."""
    inner = model.rank * len(block.adapted)
    if knobs.lora_dtype == "float32":
        return 4 * (sum(block.adapted) + inner)
    return knobs.act * (block.inputs + inner)


def _kept(model: Anatomy, block: Block, tokens: int, knobs: Knobs) -> dict[str, float]:
    """As `kept_by_forward`, without what the knobs put elsewhere."""
    kept = kept_by_forward(model, block, knobs)
    if knobs.mlp_chunk:
        # Chunks are recomputed, one at a time, from the MLP's input.
        kept["MLP"] = kept["MLP"] * _chunk_share(tokens, knobs) + knobs.act * block.width
    if knobs.recompute == "all_but_attention":
        del kept["attention out, lse"]  # counted with the inputs
    return kept


def _chunk_share(tokens: int, knobs: Knobs) -> float:
    """Share of the tokens that is in the MLP at a time."""
    return min(1.0, knobs.mlp_chunk / tokens) if knobs.mlp_chunk else 1.0


def _block_parts(model: Anatomy, block: Block, tokens: int, knobs: Knobs) -> dict[str, float]:
    """Bytes that one block holds when its backward needs most.

    Either in the MLP, where all is still kept that the forward kept, or in attention, when what the
    MLP kept is gone.
    """
    act, width = knobs.act, block.width
    kept, chunk = _kept(model, block, tokens, knobs), _chunk_share(tokens, knobs)
    # Of the output, the residual, hidden units and what comes before them; a fused output layer's
    # is of attention and MLP in one.
    hidden = (4 if block.gated else 2) * block.mlp * chunk + block.fused * width
    in_mlp = act * (2 * width + hidden)
    # Of the residual, attention's result, q, k, v, and q and k once more in fp32 for RoPE.
    in_attention = act * 5 * width + 8 * width
    if knobs.sequence > 1:  # what is sent and what is received
        in_attention += act * 2 * width
    if kept["MLP"] + in_mlp >= in_attention:
        kept["gradients"] = in_mlp
    else:
        kept |= {"MLP": 0, "gradients": in_attention}
    return {part: size * tokens for part, size in kept.items()}


@dataclass(frozen=True)
class Flops:
    """Operations of a step, or of one forward. attention: 4 x heads x head_dim a kept token pair
    in a forward, 2.5 times that in a backward; dense_attention: were all pairs kept.

    matmul: linear layers of the frozen base (and cross-attention, whose keys are few); backward
    needs gradients of their inputs alone. lora: the adapter's, in fp32. elementwise: bytes moved.
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
    """Of a step, or of one forward, by part. offload: the transfers that nothing hides; exchange:
    those between GPUs that share samples, all of them."""

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
    """How often a block's forward is computed, and its backward."""

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
    """Of `passes` over `batch` samples; densities: kept share of the token pairs of each layer."""
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
    """Of `passes` over `batch` samples on `gpu`; see `rates` for what is measured."""
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
    # Out under the forward, back under the rest, of which the forward is the shorter.
    forward = shared.total / (passes.forward + 2 * passes.backward)
    return replace(shared, offload=max(0.0, transfer - forward))


def exchanged_bytes(model: Anatomy, tokens: int, knobs: Knobs, passes: Passes) -> float:
    """What each of the GPUs that share a batch of `tokens` sends to the others in `passes`.

    In every block queries, keys, values and attention's result of its tokens go around once in a
    forward and their gradients once in a backward, but for the heads that stay where they are.
    """
    width = sum(block.width for block in model.blocks)
    leaving = tokens / knobs.sequence * (1 - 1 / knobs.sequence)
    return 4 * knobs.act * width * leaving * (passes.forward + passes.backward)


def cache_bytes(job: Job, model: Anatomy) -> tuple[int, int]:
    """Of one clip's latents and one caption's embeddings at its longest, on disk."""
    act = read_knobs(job.config).act
    tokens = job.family.text.max_tokens
    return act * math.prod(job.latent_shape(job.frames)), act * tokens * model.text_width


def forward_memory(model: Anatomy, tokens: int, knobs: Knobs, samples: int) -> dict[str, float]:
    """Bytes by part of a forward without gradients, of so many samples of `tokens` at once."""
    act, working = knobs.act, 0.0
    for block in set(model.blocks):
        # The residual and its norm; then q, k, v, of which two in fp32 for RoPE, and the result;
        # then hidden units before and after their activation, and a fused layer's input.
        in_attention = act * 6 * block.width + 8 * block.width
        in_mlp = act * ((3 if block.gated else 2) * block.mlp + 2 * block.width)
        if block.fused:
            in_mlp += act * (block.mlp + 2 * block.width)
            in_attention += act * block.mlp  # runs ahead of attention
        working = max(working, in_attention, in_mlp)
    return {
        "frozen base": base_bytes(model, knobs),
        "LoRA": 4 * model.lora,
        "one block": samples * tokens * working,
        "positions": model.rope * tokens,
    }


def decoding_bytes(job: Job) -> float:
    """Return the bytes of the decoder's activations for one chunk of frames, of any length."""
    return job.family.vae.decoder_memory.bytes(job.config.height, job.config.width)
