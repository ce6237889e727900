"""Mochi's VAE, a few frames at a time, with the results of whole clips."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vae import DecoderMemory, VideoCodec, channel_statistics, scale_pixels

Layer = Callable[[Tensor], Tensor]

# Limits of the input of one attention call, which has all frames of some places: 2**25 numbers are
# 128 MB in fp32, and CUDA's attention takes no more places (the stock encoder's limit).
MOST_NUMBERS, MOST_PLACES = 2**25, 2**15


class MochiVae(VideoCodec):
    # Two latent frames, and the past that convolutions keep; see `decode_chunks`.
    decoder_memory = DecoderMemory(frames=12, side=None, channels=128, times=7)

    def encode_chunks(self, vae: Any, pixels: Tensor) -> Iterator[Tensor]:
        """Yield the result of `vae.encode`, tiles in space included, in the memory of
        `EncoderInParts`."""
        kept = (*vae.parameters(), *vae.buffers(), vae.decoder)
        vae = copy.deepcopy(vae, {id(part): part for part in kept})
        vae.encoder = EncoderInParts(vae.encoder, vae.num_sample_frames_batch_size)
        yield vae.encode(scale_pixels(vae, pixels)).latent_dist.mode()

    def decode_chunks(self, vae: Any, latents: Tensor) -> Iterator[Tensor]:
        """Yield the result of `vae.decode` without tiles, `vae.num_latent_frames_batch_size` latent
        frames (2) at a time.

        It is equal except for the rounding of convolutions, which depends on their size.

        At 480 x 848 the 12 frames of a chunk take 2.3 GiB in fp32 at the decoder's full resolution
        (128 channels), about five times over within a block, and the past frames that the
        convolutions keep 4.9 GiB: about 17 GiB, whatever the length.
        """
        decoder = continuing(vae.decoder)
        padding = vae.temporal_compression_ratio - 1  # frames before the first
        for chunk in latents.split(vae.num_latent_frames_batch_size, dim=2):
            pixels, _ = decoder(chunk)
            yield pixels[:, :, padding:]
            padding = 0

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = channel_statistics(vae, latents)
        return (latents - mean) * vae.config.scaling_factor / std

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        latents = latents.to(vae.dtype)
        mean, std = channel_statistics(vae, latents)
        return latents * std / vae.config.scaling_factor + mean  # rounded as the pipeline rounds


class ContinuedConv(nn.Module):
    """A causal convolution over a video that comes in chunks `[B, C, frames, H, W]`.

    Edges are replicated as in the stock layer: in space always, in time before the first chunk.
    Later chunks continue from the frames that earlier outputs still left to be read.
    `conv_cache` is the stock layer's protocol.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.conv = stock.conv
        self.frames_before = stock.time_pad  # frames before an output's own
        self.step = stock.conv.stride[0]
        self.space = (stock.width_pad, stock.width_pad, stock.height_pad, stock.height_pad)
        self.past: Tensor | None = None

    def forward(self, inputs: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
        if self.past is None:
            self.past = inputs[:, :, :1].expand(-1, -1, self.frames_before, -1, -1)
        inputs = torch.cat([self.past, inputs], dim=2)
        outputs = (inputs.shape[2] - self.frames_before - 1) // self.step + 1
        self.past = inputs[:, :, outputs * self.step :].clone()
        inputs = F.pad(inputs, (*self.space, 0, 0), mode="replicate")
        return self.conv(inputs), None


def continuing(part: Any) -> Any:
    """Return an encoder or decoder over the same weights that continues from chunk to chunk.

    `part` itself is left unchanged. The stock switch for this, `_enable_framewise_decoding`, also
    drops the padding in space, which these convolutions need.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

    shared = {id(x): x for tensors in (part.parameters(), part.buffers()) for x in tensors}
    part = copy.deepcopy(part, shared)
    for module in list(part.modules()):
        for name, child in module.named_children():
            if isinstance(child, CogVideoXCausalConv3d):
                setattr(module, name, ContinuedConv(child))
    return part


class EncoderInParts(nn.Module):
    """Mochi's encoder without the activations of a whole clip at its full size.

    The convolutions are causal and continue from one chunk of `frames` to the next. Attention is
    causal too, over the frames of one place, so it takes all frames of some places at a time: to
    continue from chunk to chunk it would have to keep keys and values, 46 GB for 667 frames of a
    tile of 256 x 256. Of the whole clip only the first attention's input is kept, at half the
    height and width, twice: 2 x 5.2 GiB for that tile, where all frames at once take five times
    10.4 GiB at the full size (193 MB instead of 637 MB, measured on 121 frames of 64 x 64 with
    fewer places at a time). The result is equal except for the rounding of sums, which depends on
    their size.
    """

    def __init__(self, stock: Any, frames: int) -> None:
        super().__init__()
        self.stock, self.frames = stock, frames

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Return moments `[B, C, f, h, w]` of `[B, 3, F, H, W]`, and None for the stock cache."""
        video = pixels
        for layers, step, attention in _steps(continuing(self.stock)):
            video = self._by_frames(layers, step, video, replace=video is not pixels)
            if attention is not None:
                self._attend(*attention, video)
        return video, None

    def _by_frames(self, layers: list[Layer], step: int, video: Tensor, *, replace: bool) -> Tensor:
        """Apply the layers to a video; they make one frame of `step`.

        replace: write the result into the video's own memory if the shapes are the same.
        """
        out, done = None, 0
        for chunk in self._chunks(video):
            for layer in layers:
                chunk = layer(chunk)
            if out is None:
                shape = (*chunk.shape[:2], -(-video.shape[2] // step), *chunk.shape[3:])
                out = video if replace and shape == video.shape else chunk.new_empty(shape)
            out[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        assert out is not None and done == out.shape[2]
        return out

    def _chunks(self, video: Tensor) -> Iterator[Tensor]:
        """Split a video into chunks of `frames`; the first has one more, the last the remainder."""
        count = max(1, (video.shape[2] - 1) // self.frames)
        for index in range(count):
            first = index * self.frames + (index > 0)
            last = (index + 1) * self.frames + 1 if index + 1 < count else None
            yield video[:, :, first:last]

    def _attend(self, norm: Layer, attention: Layer, video: Tensor) -> None:
        """Add attention over the frames of each place, in place."""
        normed = self._by_frames([norm], 1, video, replace=False)
        batch, channels, frames, height, width = video.shape
        places = min(MOST_PLACES, MOST_NUMBERS // (frames * channels)) // batch
        rows = max(1, places // width)
        for part, target in zip(normed.split(rows, 3), video.split(rows, 3), strict=True):
            lines = part.permute(0, 3, 4, 2, 1)  # [B, rows, W, F, C]
            made = attention(lines.flatten(0, 2).contiguous()).view(lines.shape)
            target += made.permute(0, 4, 3, 1, 2)


def _steps(encoder: Any) -> Iterator[tuple[list[Layer], int, tuple[Layer, Layer] | None]]:
    """Yield the encoder's stages: causal layers, the number of frames that they make one of, and
    the norm and attention that follow them."""
    layers: list[Layer] = [encoder.fourier_features, _on_channels(encoder.proj_in)]
    step = 1
    for block in (encoder.block_in, *encoder.down_blocks, encoder.block_out):
        if hasattr(block, "conv_in"):
            layers.append(_first(block.conv_in))
            step *= block.conv_in.step
        for resnet, norm, attention in zip(
            block.resnets, block.norms, block.attentions, strict=True
        ):
            layers.append(_first(resnet))
            if attention is not None:
                yield layers, step, (norm, attention)
                layers, step = [], 1
    layers += [encoder.norm_out, encoder.nonlinearity, _on_channels(encoder.proj_out)]
    yield layers, step, None


def _first(layer: Any) -> Layer:
    """Drop the cache that a stock layer returns beside its result."""
    return lambda video: layer(video)[0]


def _on_channels(layer: Layer) -> Layer:
    """Apply a layer over the last dimension to the channels of `[B, C, F, H, W]`."""
    return lambda video: layer(video.movedim(1, -1)).movedim(-1, 1)
