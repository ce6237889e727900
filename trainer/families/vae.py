"""Pixels to latents and back, by a family's VAE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DecoderMemory:
    """Describes what a published VAE's decoder holds at full resolution, in fp32: an assumption of
    memory estimates.

    It holds `times` tensors of `channels` channels over `frames` frames of at most `side` x `side`
    pixels. side: None for whole frames.
    """

    frames: int
    side: int | None
    channels: int
    times: float

    def bytes(self, height: int, width: int) -> float:
        """Return the bytes of one chunk's activations; they do not grow with the video's length."""
        side = self.side or max(height, width)
        pixels = min(height, side) * min(width, side)
        return 4.0 * self.times * self.frames * self.channels * pixels


class VideoCodec(ABC):
    """Encodes and decodes clips with a VAE, in as little memory as the VAE allows."""

    decoder_memory: ClassVar[DecoderMemory]  # must follow from how `decode_chunks` goes

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return latents `[C, f, h, w]` fp32, at the transformer's scale, of frames.

        The latents are the mode of the VAE's posterior, so that the same clip always gives the
        same ones. pixels: uint8 `[F, H, W, 3]`.
        """
        self.limit_memory(vae)
        with torch.no_grad():
            latents = torch.cat(list(self.encode_chunks(vae, pixels)), dim=2).float()
        return self.normalise(vae, latents)[0]

    def decode(self, vae: Any, latents: Tensor) -> Iterator[np.ndarray]:
        """Yield uint8 frames `[H, W, 3]`, one at a time, of the transformer's latents
        `[C, f, h, w]`.

        A few latent frames are decoded at a time: memory does not grow with the video's length.
        """
        self.limit_memory(vae)
        chunks = self.decode_chunks(vae, self.denormalise(vae, latents[None].to(vae.device)))
        while True:
            with torch.no_grad():  # not across the yield: it would reach the caller
                pixels = next(chunks, None)
            if pixels is None:
                return
            pixels = (pixels[0] / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
            yield from pixels.permute(1, 2, 3, 0).cpu().numpy()

    def limit_memory(self, vae: Any) -> None:
        """Let the VAE take large frames in spatial tiles where whole ones need too much memory."""
        vae.enable_tiling()

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        """Yield modes `[1, C, f, h, w]` of the posterior, of some frames at a time if the VAE
        allows it.

        Concatenated they equal the result of `vae.encode`. pixels: as for `encode`, on any device.
        """
        yield vae.encode(scale_pixels(vae, pixels)).latent_dist.mode()

    @abstractmethod
    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels `[1, 3, frames, H, W]` in [-1, 1], some frames at a time.

        Concatenated they equal the result of `vae.decode(latents)`.
        """

    @abstractmethod
    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        """Bring the VAE's latents `[B, C, f, h, w]` to the transformer's scale."""

    @abstractmethod
    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        """Invert `normalise`, in the VAE's dtype."""


def scale_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Turn uint8 `[F, H, W, 3]` into the VAE's input: `[1, 3, F, H, W]` in [-1, 1].

    Pixels go to the device as bytes and are scaled in place: 509 frames of 720 x 1280 are 5.2 GiB
    in fp32.
    """
    return pixels.to(vae.device).permute(3, 0, 1, 2)[None].to(vae.dtype).div_(127.5).sub_(1)


def posterior_mode(moments: Tensor) -> Tensor:
    """Return the mode of a diagonal Gaussian whose channels are its mean, then its log variance."""
    return moments.chunk(2, dim=1)[0]


def channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent channel, `[C, 1, 1, 1]`, from the VAE's
    config.

    They are 0 and 1 where the config lacks either, in the dtype and on the device of `like`.
    """
    mean, std = vae.config.latents_mean, vae.config.latents_std
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    mean, std = torch.tensor([mean, std]).to(like)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
