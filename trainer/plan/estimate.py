"""The memory of a step, of a forward and of the cache, computed from an `Anatomy`.

Tensors are counted as the stock blocks keep them for backward; `rates.CALIBRATION` says how far
that has been checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import Config, Lora, Memory, Parallel, Train
from ..job import Job
from . import rates
from .anatomy import Anatomy, Block

GIB = 2**30
BYTES = {"bfloat16": 2, "float32": 4, "float8": 1}


@dataclass(frozen=True)
class Knobs(Memory):
    """All settings that a step's memory and time depend on: the section `memory`, and others.

    optimizer: `train.optimizer`. lora_dtype: `lora.compute_dtype`. sequence: `parallel.sequence`,
    the GPUs that share the tokens of one sample. engine: `parallel.engine`, or ddp. gpus: of the
    run, over which the engine shards.
    """

    optimizer: str = Train.optimizer
    lora_dtype: str = Lora.compute_dtype
    sequence: int = Parallel.sequence
    engine: str = "ddp"
    gpus: int = 1

    @property
    def base_shards(self) -> int:
        """The number of GPUs that hold a shard of the frozen base each."""
        return self.gpus if self.engine in ("zero3", "fsdp2") else 1

    @property
    def act(self) -> int:
        """Bytes per element of the activations that blocks pass on."""
        return 4 if self.base_dtype == "float32" else 2


def read_knobs(config: Config, gpus: int | None = None) -> Knobs:
    """Read the knobs of a config. gpus: of the run; None for those that share one sample."""
    return Knobs(
        **vars(config.memory),
        optimizer=config.train.optimizer,
        lora_dtype=config.lora.compute_dtype,
        sequence=config.parallel.sequence,
        engine=config.parallel.engine or "ddp",
        gpus=config.parallel.sequence if gpus is None else gpus,
    )


@dataclass(frozen=True)
class MemoryUse:
    """Peak bytes: of one GPU, by part; of its process's host memory, by successive stage."""

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
        """Bytes of the GPU that length, recomputation, offloading and chunking do not change."""
        return sum(self.gpu[part] for part in ("frozen base", "LoRA, gradients, moments"))


def training_memory(model: Anatomy, tokens: int, knobs: Knobs) -> MemoryUse:
    """Return a step's peak, which is in the backward of the block that needs most.

    All block inputs count as still kept then. tokens: of a whole batch, text included. If GPUs
    share samples, an equal part of all tokens is counted for each, although it holds all text.
    """
    tokens = -(-tokens // knobs.sequence)
    inputs = [_kept_by_checkpoint(model, block, knobs) * tokens for block in model.blocks]
    parts = {block: _block_parts(model, block, tokens, knobs) for block in set(model.blocks)}
    if knobs.recompute == "none":
        kept = {b: sum(_kept(model, b, tokens, knobs).values()) for b in set(model.blocks)}
        inputs = [kept[block] * tokens for block in model.blocks]
    gpu_inputs, host_inputs = sum(inputs), 0.0
    if knobs.offload:
        # The last blocks, and two whose tensors are being copied.
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
    """Return the bytes of the adapter, its gradients and moments on one GPU.

    All are fp32, but for moments of 8 bits. ZeRO's optimizer updates a further, sharded copy of the
    parameters.
    """
    moments = 2 if knobs.optimizer == "adamw8bit" else 8
    if knobs.engine == "fsdp2":
        return model.lora * (4 + 4 + moments) / knobs.gpus
    if knobs.engine == "zero3":
        return model.lora * (4 + 4 + 4 + moments) / knobs.gpus
    if knobs.engine == "zero2":
        return model.lora * (4 + 4 + (4 + moments) / knobs.gpus)
    return model.lora * (4 + 4 + moments)


def gathered_bytes(model: Anatomy, knobs: Knobs) -> float:
    """Return the bytes of a sharded base that a GPU holds whole at a time.

    These are two blocks, one of which is being gathered, and all layers outside of blocks.
    """
    each = base_bytes(model, knobs) / model.params
    largest = max(block.params for block in model.blocks)
    return each * (2 * largest + model.params - sum(block.params for block in model.blocks))


def base_bytes(model: Anatomy, knobs: Knobs) -> float:
    """Return the bytes of the frozen weights.

    With float8, weights of blocks take one byte, and one layer at a time is dequantised to bf16.
    The few weights that diffusers keeps in fp32 (Wan's norms and timestep embedding) count as the
    rest.
    """
    if knobs.base_dtype != "float8":
        return model.params * BYTES[knobs.base_dtype]
    blocks = sum(block.params for block in model.blocks)
    largest = max(b.width * (b.mlp * (1 + b.gated) + b.width * b.fused) for b in model.blocks)
    return blocks * BYTES["float8"] + (model.params - blocks + largest) * BYTES["bfloat16"]


def _kept_by_checkpoint(model: Anatomy, block: Block, knobs: Knobs) -> int:
    """Return the bytes per token that a checkpointed block keeps.

    That is its input and, with `all_but_attention`, attention's output and log-sum-exp.
    """
    attention = knobs.act * block.width + 4 * model.heads
    return knobs.act * block.width + attention * (knobs.recompute == "all_but_attention")


def kept_by_forward(model: Anatomy, block: Block, knobs: Knobs) -> dict[str, float]:
    """Return the bytes per token, by part, that a block's forward keeps for its backward."""
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
    """Return the bytes per token of the adapter's inputs, kept for backward.

    For an fp32 adapter PEFT casts the input of each adapted layer, in a copy of its own.
    """
    inner = model.rank * len(block.adapted)
    if knobs.lora_dtype == "float32":
        return 4 * (sum(block.adapted) + inner)
    return knobs.act * (block.inputs + inner)


def _kept(model: Anatomy, block: Block, tokens: int, knobs: Knobs) -> dict[str, float]:
    """Return the bytes per token that a block keeps on the GPU.

    That is `kept_by_forward` minus what recomputation or chunking removes.
    """
    kept = kept_by_forward(model, block, knobs)
    if knobs.mlp_chunk:
        # Chunks are recomputed one at a time from the MLP's input.
        kept["MLP"] = kept["MLP"] * _chunk_share(tokens, knobs) + knobs.act * block.width
    if knobs.recompute == "all_but_attention":
        del kept["attention out, lse"]  # counted with the inputs
    return kept


def _chunk_share(tokens: int, knobs: Knobs) -> float:
    """Return the share of the tokens that the MLP computes at a time."""
    return min(1.0, knobs.mlp_chunk / tokens) if knobs.mlp_chunk else 1.0


def _block_parts(model: Anatomy, block: Block, tokens: int, knobs: Knobs) -> dict[str, float]:
    """Return the bytes, by part, that one block holds when its backward needs most.

    That is either in the MLP, with everything that the forward kept, or in attention, after the
    tensors of the MLP are freed.
    """
    act, width = knobs.act, block.width
    kept, chunk = _kept(model, block, tokens, knobs), _chunk_share(tokens, knobs)
    # Gradients of the output, the residual, the hidden units and their inputs. A fused output layer
    # has one gradient for attention and MLP together.
    hidden = (4 if block.gated else 2) * block.mlp * chunk + block.fused * width
    in_mlp = act * (2 * width + hidden)
    # Gradients of the residual, attention's output, q, k and v, and of q and k in fp32 for RoPE.
    in_attention = act * 5 * width + 8 * width
    if knobs.sequence > 1:  # buffers to send and to receive
        in_attention += act * 2 * width
    if kept["MLP"] + in_mlp >= in_attention:
        kept["gradients"] = in_mlp
    else:
        kept |= {"MLP": 0, "gradients": in_attention}
    return {part: size * tokens for part, size in kept.items()}


def cache_bytes(job: Job, model: Anatomy) -> tuple[int, int]:
    """Return the bytes on disk of one clip's latents and of the longest caption's embeddings."""
    act = read_knobs(job.config).act
    tokens = job.family.text.max_tokens
    return act * math.prod(job.latent_shape(job.frames)), act * tokens * model.text_width


def forward_memory(model: Anatomy, tokens: int, knobs: Knobs, samples: int) -> dict[str, float]:
    """Return the bytes, by part, of a forward without gradients of `samples` x `tokens`."""
    act, working = knobs.act, 0.0
    for block in set(model.blocks):
        # Attention: the residual, its norm, q, k, v, q and k in fp32 for RoPE, and the output.
        # MLP: hidden units before and after their activation, and a fused layer's input.
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
