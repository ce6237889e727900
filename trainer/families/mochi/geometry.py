"""Sizes of Mochi 1 models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...config.values import ConfigError
from ..joint import JointGeometry
from ..loader import ModelConfigs
from ..names import ModelNames


class MochiGeometry(JointGeometry):
    @classmethod
    def read(cls, names: ModelNames, configs: ModelConfigs) -> MochiGeometry:
        transformer, vae = configs.transformer, configs.vae
        channels = transformer["in_channels"]
        latent_channels = vae.get("latent_channels", 12)
        if channels != latent_channels or transformer.get("out_channels") not in (None, channels):
            raise ConfigError(
                f"{configs.path} is not a text-to-video model: its transformer takes {channels} "
                f"channels and gives {transformer.get('out_channels') or channels}, its VAE has "
                f"{latent_channels}; family={names.family} takes models such as "
                f"{names.repository}."
            )
        return cls(
            family=names.family,
            temporal=math.prod(vae.get("temporal_expansions", (1, 2, 3))),
            spatial=math.prod(vae.get("spatial_expansions", (2, 2, 2))),
            patch=patch_size(transformer),
            latent_channels=channels,
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
        )


def patch_size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return latent frames, rows and columns of a token, from the transformer's config."""
    return 1, config["patch_size"], config["patch_size"]
