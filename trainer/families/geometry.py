"""The sizes of a model, and the video lengths and resolutions that they allow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ...sparse.grid import TokenGrid
from ..config.values import ConfigError
from .loader import ModelConfigs
from .names import ModelNames
from .rope import NATIVE, RopePolicy, TemporalAxis


@dataclass(frozen=True)
class Geometry(ABC):
    """Holds the sizes of a model that decide shapes and cost; all come from its JSON files.

    family: named in error messages. temporal, spatial: compression of the VAE. patch: latent
    frames, rows and columns of a token. layers, heads, head_dim: of self-attention.
    rope: the temporal axis of RoPE; None for a model with learned frequencies.
    max_positions: rows of the RoPE table along each axis; None without a limit.
    guidance_embeds: True for a guidance-distilled model, which takes its guidance as an input.
    """

    family: str
    temporal: int
    spatial: int
    patch: tuple[int, int, int]
    latent_channels: int
    layers: int
    heads: int
    head_dim: int
    rope: TemporalAxis | None = None
    max_positions: int | None = None
    guidance_embeds: bool = False

    @classmethod
    @abstractmethod
    def read(cls, names: ModelNames, configs: ModelConfigs) -> Geometry:
        """Read the sizes from a model's settings; raise ConfigError for unsupported variants."""

    @property
    def frame_step(self) -> int:
        """Frames that one more latent frame takes: valid lengths are k * frame_step + 1."""
        return self.temporal

    @abstractmethod
    def extended_frames(self, native: int, factor: int) -> int:
        """Return the length in frames that counts as `factor` times `native`."""

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.temporal + 1

    def positions(self, frames: int) -> int:
        """Return the number of temporal positions: latent frames / latent frames of a token."""
        return self.latent_frames(frames) // self.patch[0]

    def check_frames(self, frames: int, rope: RopePolicy = NATIVE) -> None:
        """Raise ConfigError, with the nearest valid lengths, if the model cannot take `frames`."""
        step = self.frame_step
        if frames < 1 or (frames - 1) % step:
            below = max(frames - 1, 0) // step * step + 1
            raise ConfigError(
                f"frames={frames}: {self.family} takes {step}k + 1 frames; the nearest are {below} "
                f"and {below + step}."
            )
        positions, rows = self.positions(frames), self.max_positions
        if rows is not None and positions > rope.most_positions(rows):
            most = (rope.most_positions(rows) * self.patch[0] - 1) * self.temporal
            raise ConfigError(
                f"frames={frames} is {positions} latent frames, but the model's RoPE table ends at "
                f"{rows}: at most {most // step * step + 1} frames under rope.policy={rope.policy}."
            )

    def latent_shape(
        self, frames: int, height: int, width: int, rope: RopePolicy = NATIVE
    ) -> tuple[int, int, int, int]:
        """Return `[channels, frames, height, width]` of a video's latents.

        Raises ConfigError for invalid lengths and for sides that do not divide into patches.
        """
        self.check_frames(frames, rope)
        for name, pixels, patch in zip(
            ("height", "width"), (height, width), self.patch[1:], strict=True
        ):
            step = self.spatial * patch
            if pixels < step or pixels % step:
                below = max(pixels // step, 1) * step
                raise ConfigError(
                    f"{name}={pixels} must be a multiple of {step}; the nearest are {below} and "
                    f"{below + step}."
                )
        size = (height // self.spatial, width // self.spatial)
        return self.latent_channels, self.latent_frames(frames), *size

    def grid(self, latent_shape: Sequence[int], text_tokens: int = 0) -> TokenGrid:
        """Return the transformer's sequence for latents `[..., frames, height, width]`."""
        return token_grid(latent_shape, self.patch, text_tokens)

    def uses_negative(self, guidance: float) -> bool:
        """Return whether sampling takes a negative prompt, with a second forward a step."""
        return guidance > 1 and not self.guidance_embeds


def token_grid(
    latent_shape: Sequence[int], patch: Sequence[int], text_tokens: int = 0
) -> TokenGrid:
    """Return the sequence for latents `[..., frames, height, width]` in patches of this size."""
    frames, height, width = (s // p for s, p in zip(latent_shape[-3:], patch, strict=True))
    return TokenGrid(frames, height, width, text_tokens)
