"""Sizes of HunyuanVideo models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.values import ConfigError
from ..joint import JointGeometry
from ..loader import ModelConfigs
from ..names import ModelNames
from .rope import temporal_axis


class HunyuanGeometry(JointGeometry):
    @classmethod
    def read(cls, names: ModelNames, configs: ModelConfigs) -> HunyuanGeometry:
        transformer, vae = configs.transformer, configs.vae
        channels = transformer["in_channels"]
        if transformer.get("image_condition_type") or channels != vae["latent_channels"]:
            raise ConfigError(
                f"{configs.path} is an image-to-video model, which is not supported yet; "
                f"family={names.family} takes HunyuanVideo text-to-video, such as "
                f"{names.repository}."
            )
        return cls(
            family=names.family,
            temporal=vae.get("temporal_compression_ratio", 4),
            spatial=vae.get("spatial_compression_ratio", 8),
            patch=patch_size(transformer),
            latent_channels=channels,
            layers=transformer["num_layers"] + transformer["num_single_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            rope=temporal_axis(transformer),
            guidance_embeds=transformer["guidance_embeds"],
        )


def patch_size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return latent frames, rows and columns of a token, from the transformer's config."""
    return config["patch_size_t"], config["patch_size"], config["patch_size"]
