"""Sizes of Wan 2.1 models."""

from __future__ import annotations

from ...config.values import ConfigError
from ..geometry import Geometry
from ..loader import ModelConfigs
from ..names import ModelNames
from .rope import temporal_axis


class WanGeometry(Geometry):
    @classmethod
    def read(cls, names: ModelNames, configs: ModelConfigs) -> WanGeometry:
        index, transformer, vae = configs.index, configs.transformer, configs.vae
        unsupported = None
        if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0]:
            unsupported = "a Wan 2.2 model of two experts"
        elif index.get("expand_timesteps"):
            unsupported = "a Wan 2.2 text-and-image model with a timestep per token"
        elif transformer.get("image_dim") or transformer["in_channels"] != vae["z_dim"]:
            unsupported = "an image-to-video model"
        if unsupported:
            raise ConfigError(
                f"{configs.path} is {unsupported}, which is not supported yet; "
                f"family={names.family} takes Wan 2.1 text-to-video, such as {names.repository}."
            )
        return cls(
            family=names.family,
            # Wan 2.1's published VAE config predates the two scale factors.
            temporal=vae.get("scale_factor_temporal", 4),
            spatial=vae.get("scale_factor_spatial", 8),
            patch=tuple(transformer["patch_size"]),
            latent_channels=transformer["in_channels"],
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            rope=temporal_axis(transformer["attention_head_dim"]),
            max_positions=transformer.get("rope_max_seq_len", 1024),
        )

    @property
    def frame_step(self) -> int:
        # Whatever its compression, the VAE reads one frame, then four at a time, and drops fewer.
        return max(self.temporal, 4)

    def extended_frames(self, native: int, factor: int) -> int:
        return (native - 1) * factor + 1
