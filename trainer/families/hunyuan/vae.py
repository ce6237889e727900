"""HunyuanVideo's VAE, one tile of frames at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..vae import DecoderMemory, VideoCodec, posterior_mode, scale_pixels


class HunyuanVae(VideoCodec):
    decoder_memory = DecoderMemory(frames=17, side=256, channels=128, times=5)  # one tile

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        # The steps of `vae.encode`: tiles of some frames and one before them, each faded into the
        # next. Only the last tile is kept.
        step, size = vae.tile_sample_stride_num_frames, vae.tile_sample_min_num_frames
        if not vae.use_framewise_encoding or len(pixels) <= size:
            yield posterior_mode(_encode_tile(vae, scale_pixels(vae, pixels)))
            return
        ratio = vae.temporal_compression_ratio
        left, before = (len(pixels) - 1) // ratio + 1, None
        for start in range(0, len(pixels), step):
            tile = _encode_tile(vae, scale_pixels(vae, pixels[start : start + size + 1]))
            if before is None:
                chunk = tile[:, :, : step // ratio + 1]
            else:
                tile = vae.blend_t(before, tile[:, :, 1:], (size - step) // ratio)
                chunk = tile[:, :, : step // ratio]
            chunk = chunk[:, :, :left]
            before, left = tile, left - chunk.shape[2]
            if chunk.shape[2]:  # a last tile may hold just the frame before it
                yield posterior_mode(chunk)

    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        # The steps of `vae.decode`: tiles of some latent frames and one before them, each faded
        # into the next. Only the last tile is kept.
        step, size = vae.tile_sample_stride_num_frames, vae.tile_sample_min_num_frames
        latent_step, latent_size = (n // vae.temporal_compression_ratio for n in (step, size))
        if not vae.use_framewise_decoding or latents.shape[2] <= latent_size:
            yield _decode_tile(vae, latents)
            return
        left = (latents.shape[2] - 1) * vae.temporal_compression_ratio + 1
        before = None
        for start in range(0, latents.shape[2], latent_step):
            tile = _decode_tile(vae, latents[:, :, start : start + latent_size + 1])
            if before is None:
                chunk = tile[:, :, : step + 1]
            else:
                tile = vae.blend_t(before, tile[:, :, 1:], size - step)
                chunk = tile[:, :, :step]
            chunk = chunk[:, :, :left]
            before, left = tile, left - chunk.shape[2]
            if chunk.shape[2]:  # a last tile may hold just the frame before it
                yield chunk

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        return latents * vae.config.scaling_factor

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        return latents.to(vae.dtype) / vae.config.scaling_factor


def _encode_tile(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels that are not split over time, spatially tiled where the VAE would."""
    height, width = pixels.shape[-2:]
    if vae.use_tiling and (
        height > vae.tile_sample_min_height or width > vae.tile_sample_min_width
    ):
        return vae.tiled_encode(pixels)
    return vae.quant_conv(vae.encoder(pixels))


def _decode_tile(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents that are not split over time, spatially tiled where the VAE would."""
    height, width = (size * vae.spatial_compression_ratio for size in latents.shape[-2:])
    if vae.use_tiling and (
        height > vae.tile_sample_min_height or width > vae.tile_sample_min_width
    ):
        return vae.tiled_decode(latents).sample
    return vae.decoder(vae.post_quant_conv(latents))
