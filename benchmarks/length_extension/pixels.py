"""Wan's architecture on pixels, without a VAE or a text encoder.

Squares of pixels replace latents, and a fixed random vector per word replaces text embeddings.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreel.sparse.attention import SparseAttention
from longreel.trainer.families.base import ModelFamily
from longreel.trainer.families.rope import TemporalAxis
from longreel.trainer.families.text import Text
from longreel.trainer.families.wan.family import WAN
from longreel.trainer.families.wan.geometry import WanGeometry
from longreel.trainer.families.wan.rope import temporal_axis
from longreel.trainer.families.wan.text import WanText

from .settings import Scale

# Approximate mean and spread of the sets' pixels in [0, 1]; most are background.
CENTRE, SPREAD = 0.25, 0.35


@dataclass(frozen=True)
class PixelText(WanText):
    """Pads captions to `tokens`, all of which the model attends to."""

    tokens: int

    def collate(self, texts: Sequence[Text]) -> Text:
        embeds = [text["prompt_embeds"] for text in texts]
        padded = [F.pad(x, (0, 0, 0, self.tokens - len(x))) for x in embeds]
        return {"encoder_hidden_states": torch.stack(padded)}


@dataclass(frozen=True, eq=False)
class PixelWan(ModelFamily):
    """Adapts the Wan family to one scale of the experiment, without pipelines or Hub files."""

    scale: Scale

    @classmethod
    def at(cls, scale: Scale) -> PixelWan:
        text = PixelText(WAN.names, scale.context)
        defaults = replace(WAN.defaults, native_frames=scale.native)
        return cls(**vars(WAN) | {"text": text, "defaults": defaults, "scale": scale})

    @property
    def axis(self) -> TemporalAxis:
        return temporal_axis(self.scale.head_dim)

    @property
    def shape(self) -> WanGeometry:
        scale = self.scale
        return WanGeometry(
            family=self.name,
            temporal=1,
            spatial=scale.squeeze,
            patch=(1, 1, 1),
            latent_channels=scale.channels,
            layers=scale.layers,
            heads=scale.heads,
            head_dim=scale.head_dim,
            rope=self.axis,
        )

    def build(self, seed: int) -> Any:
        """Build a transformer of random fp32 weights."""
        scale = self.scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.names.transformer_class(
                patch_size=(1, 1, 1),
                num_attention_heads=scale.heads,
                attention_head_dim=scale.head_dim,
                in_channels=scale.channels,
                out_channels=scale.channels,
                text_dim=scale.text_dim,
                freq_dim=scale.freq,
                ffn_dim=scale.ffn,
                num_layers=scale.layers,
            )

    def save_base(self, transformer: Any, folder: Path) -> None:
        """Save in bf16, as frozen bases are, in files of at most 12 MB.

        This rounds the given transformer's weights to bf16 too.
        """
        # Bypass diffusers' own `to`, which warns about modules that it loads in fp32.
        nn.Module.to(transformer, torch.bfloat16)
        transformer.save_pretrained(folder, max_shard_size="12MB")

    def load_base(self, folder: Path, dtype: torch.dtype) -> Any:
        return self.names.transformer_class.from_pretrained(folder, dtype=dtype)

    def encode_caption(self, caption: str) -> Text:
        """Give each word a random vector of its own, the same in every run."""
        rows = []
        for word in caption.split():
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            rows.append(torch.randn(self.scale.text_dim, generator=generator))
        return {"prompt_embeds": torch.stack(rows)}


class Bf16Attention(SparseAttention):
    """Computes attention's products in bf16 on a GPU, whatever dtype the model uses around it.

    Norms and RoPE return fp32 under autocast, which none of our kernels accepts.
    """

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type != "cuda":
            return super().attention(layer_index, q, k, v)
        # Without this, autocast would stay active inside the operator.
        with torch.autocast(q.device.type, enabled=False):
            half = (x.to(torch.bfloat16) for x in (q, k, v))
            return super().attention(layer_index, *half).to(q.dtype)


def to_latents(pixels: Tensor, squeeze: int) -> Tensor:
    """Convert uint8 `[B, T, H, W, 3]` to fp32 `[B, 3 * squeeze^2, T, H / squeeze, W / squeeze]`."""
    x = (pixels.float() / 255 - CENTRE) / SPREAD
    x = F.pixel_unshuffle(x.permute(0, 1, 4, 2, 3).flatten(0, 1), squeeze)
    return x.unflatten(0, pixels.shape[:2]).transpose(1, 2)


def to_pixels(latents: Tensor, squeeze: int) -> Tensor:
    """Invert `to_latents` and round to uint8."""
    batch, _, frames = latents.shape[:3]
    x = F.pixel_shuffle(latents.float().transpose(1, 2).flatten(0, 1), squeeze)
    x = (x * SPREAD + CENTRE).clamp(0, 1) * 255 + 0.5
    return x.to(torch.uint8).unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2)
