"""Read off a transformer on the meta device what its blocks hold, keep and compute.

Counts are per block and token; nothing here knows a length. Embeddings, the token refiner and the
output layer are in `params` alone: together they are under 1 % of a step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..families.layers import LayerNames
from ..families.published import blank_transformer
from ..job import Job

# Bytes a channel that a norm keeps for backward, by its class, in a bf16 model.
# Of block inputs:
NORM_KEEPS = {
    "LayerNorm": 2,  # its bf16 input
    "FP32LayerNorm": 4,  # an fp32 copy of it
    "RMSNorm": 4,  # an fp32 copy too
}
MODULATED_NORM_KEEPS = 2  # our kernel of those two: its bf16 input
# Of queries and keys:
FUSED_NORM_KEEPS = 2  # its bf16 input, as torch.nn.RMSNorm's kernel and ours
EAGER_NORM_KEEPS = 6  # diffusers' own: that, and an fp32 copy that `pow` keeps


@dataclass(frozen=True)
class Block:
    """One block with one self-attention of `width` channels.

    video, text: parameters of the linear layers that every token of that kind passes; joint: that
        both pass. adapted: input channels of each video layer with LoRA; inputs: of their distinct
        inputs, but for what attention returns, which is kept anyway; lora: parameters of them.
    mlp: channels of the MLP's hidden layer. gated: whether it is SwiGLU. fused: whether the MLP
        shares its output layer with attention. cross: whether text comes by cross-attention.
    norms, qk_norms: bytes a token of a bf16 model that they keep for backward.
    """

    width: int
    params: int
    video: int
    text: int
    joint: int
    adapted: tuple[int, ...]
    inputs: int
    lora: int
    mlp: int
    gated: bool
    fused: bool
    cross: bool
    norms: int
    qk_norms: int


@dataclass(frozen=True)
class Anatomy:
    """A transformer: `params` of its frozen base, `lora` of the adapter, `rank` of it."""

    params: int
    lora: int
    rank: int
    heads: int
    head_dim: int
    text_width: int
    context_tokens: int
    rope: int  # bytes of the tables a token
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def anatomy(job: Job) -> Anatomy:
    """Return the anatomy of the job's model and adapter.

    Raises ConfigError for model files that are missing.
    """
    config, geometry = job.config, job.geometry
    model = blank_transformer(job.family, job.model_path, config.model.revision)
    layers = job.family.layers
    targets = re.compile(layers.target_pattern(config.lora.targets))
    rank = config.lora.rank
    adapted = {name for name, _ in model.named_modules() if targets.fullmatch(name)}
    blocks = tuple(
        _block(block, f"{stack}.{index}.", layers, adapted, job)
        for stack, blocks in model.named_children()
        if isinstance(blocks, nn.ModuleList)
        for index, block in enumerate(blocks)
    )
    assert len(blocks) == geometry.layers
    return Anatomy(
        params=sum(p.numel() for p in model.parameters()),
        lora=rank * sum(_ends(model.get_submodule(name)) for name in adapted),
        rank=rank,
        heads=geometry.heads,
        head_dim=geometry.head_dim,
        text_width=model.config.get("text_dim") or model.config["text_embed_dim"],
        context_tokens=job.family.text.context_tokens,
        # cos and sin in fp32: half of a head's channels for each head, or all channels once
        rope=(4 * geometry.heads if job.family.rope.per_head else 8) * geometry.head_dim,
        blocks=blocks,
    )


def _block(block: Any, prefix: str, layers: LayerNames, adapted: set[str], job: Job) -> Block:
    speed, rank = job.config.speed, job.config.lora.rank
    linear = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    text = {n for n in linear if re.fullmatch(layers.text, n)}
    # All others see the video, and the text too where no layers are for text alone.
    video = linear.keys() - text - {n for n in linear if re.fullmatch(layers.modulation, n)}
    hit = [n for n in linear if n in video and prefix + n in adapted]
    inputs = {
        re.sub(rf"{layers.qkv}$", "", n): linear[n].in_features
        for n in hit
        if not n.endswith(layers.attention_out)
    }
    # A block of joint attention without layers for text: both streams are one by then.
    joint = not text
    names = next(names for names in layers.mlp if names.last in linear)
    first, last, fused = linear[names.first], linear[names.last], names.shares_output
    width = last.out_features
    mlp = last.in_features - (width if fused else 0)
    weights = sum(linear[n].weight.numel() for n in video)
    norms = qk_norms = 0
    for name, module in block.named_modules():
        if "Norm" not in type(module).__name__ or re.fullmatch(layers.text_norms, name):
            continue
        if re.fullmatch(layers.qk_norms, name):
            fused_kernel = isinstance(module, nn.RMSNorm) or speed.fused_norms
            qk_norms += width * (FUSED_NORM_KEEPS if fused_kernel else EAGER_NORM_KEEPS)
        else:
            keeps = NORM_KEEPS.get(type(module).__name__, 0)
            fused_kernel = speed.fused_modulation
            norms += width * (min(keeps, MODULATED_NORM_KEEPS) if fused_kernel else keeps)
    return Block(
        width=width,
        params=sum(p.numel() for p in block.parameters()),
        video=0 if joint else weights,
        text=sum(linear[n].weight.numel() for n in text),
        joint=weights if joint else 0,
        adapted=tuple(linear[n].in_features for n in hit),
        inputs=sum(inputs.values()),
        lora=rank * sum(_ends(linear[n]) for n in hit),
        mlp=mlp,
        gated=first.out_features == 2 * mlp,
        fused=fused,
        cross=job.family.text.context_tokens > 0,
        norms=norms,
        qk_norms=qk_norms,
    )


def _ends(layer: Any) -> int:
    """Parameters of an adapter of rank 1."""
    return layer.in_features + layer.out_features
