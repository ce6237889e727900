"""Wan 2.1's VAE, four frames at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..vae import DecoderMemory, VideoCodec, channel_statistics, posterior_mode, scale_pixels


class WanVae(VideoCodec):
    # Four whole frames, and the convolutions' caches.
    decoder_memory = DecoderMemory(frames=4, side=None, channels=96, times=8)

    def limit_memory(self, vae: Any) -> None:
        """Do nothing: the VAE takes four frames at a time anyway, and whole ones fit."""

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        # The steps of `vae.encode` without tiles, which keeps earlier frames in its caches and
        # drops a remainder of fewer than four. Here pixels come to the device as they are needed.
        assert vae.config.patch_size is None, "Wan 2.1's VAE takes pixels as they are"
        vae.clear_cache()
        try:
            for start in range(-3, len(pixels) - 3, 4):
                chunk = scale_pixels(vae, pixels[max(start, 0) : start + 4])
                vae._enc_conv_idx = [0]
                moments = vae.encoder(
                    chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx
                )
                yield posterior_mode(vae.quant_conv(moments))
        finally:
            vae.clear_cache()

    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        # The steps of `vae.decode` without tiles, which keeps earlier frames in its caches.
        vae.clear_cache()
        try:
            for index, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
                vae._conv_idx = [0]
                yield vae.decoder(
                    frame,
                    feat_cache=vae._feat_map,
                    feat_idx=vae._conv_idx,
                    first_chunk=index == 0,
                ).clamp(-1, 1)
        finally:
            vae.clear_cache()

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = channel_statistics(vae, latents)
        return (latents - mean) / std

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        latents = latents.to(vae.dtype)
        mean, std = channel_statistics(vae, latents)
        return latents / (1 / std) + mean  # rounded as the pipeline rounds
