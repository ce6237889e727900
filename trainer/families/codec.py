"""Pixels to latents and back, by a family's VAE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class VideoCodec(ABC):
    """What a family's VAE does with a clip; memory does not grow with it where it need not."""

    def encode_video(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Latents `[C, f, h, w]` fp32, as the transformer is fed, of uint8 `[F, H, W, 3]` frames.

        The mode of the VAE's posterior, so the same clip always gives the same latents.
        """
        vae = pipe.vae
        self.limit_memory(vae)
        with torch.no_grad():
            latents = torch.cat(list(self.encode_chunks(vae, pixels)), dim=2).float()
        return self.normalise(vae, latents)[0]

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        """Modes `[1, C, f, h, w]` of the posterior, some frames at a time where the VAE allows it:
        together, those of `vae.encode`. pixels: as for `encode_video`, on any device."""
        yield vae.encode(scaled(vae, pixels)).latent_dist.mode()

    def decode_video(self, pipe: Any, latents: Tensor) -> Iterator[np.ndarray]:
        """uint8 frames `[H, W, 3]`, one after another, of the transformer's latents `[C, f, h, w]`.

        A few latent frames are decoded at a time: memory does not grow with the video's length.
        """
        vae = pipe.vae
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

    @abstractmethod
    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        """Pixels `[1, 3, frames, H, W]` in [-1, 1], some frames at a time: together, those of
        `vae.decode(latents)`."""

    @abstractmethod
    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        """VAE latents `[B, C, f, h, w]` to the transformer's scale."""

    @abstractmethod
    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of `normalise`, in the VAE's dtype."""


def scaled(vae: Any, pixels: Tensor) -> Tensor:
    """uint8 `[F, H, W, 3]` as the VAE takes them: `[1, 3, F, H, W]` in [-1, 1].

    As bytes to the device, and scaled in place: 509 frames of 720 x 1280 are 5.2 GiB in fp32.
    """
    return pixels.to(vae.device).permute(3, 0, 1, 2)[None].to(vae.dtype).div_(127.5).sub_(1)


def mode(moments: Tensor) -> Tensor:
    """Of the diagonal Gaussian whose mean and log variance lie one after the other in channels."""
    return moments.chunk(2, dim=1)[0]
