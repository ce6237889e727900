"""Mochi's VAE a few frames at a time, with the results of whole clips."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]

# Of what one call of an attention is given, all frames of some places: 128 MB in fp32, and no more
# places than CUDA's attention takes (the stock encoder's limit).
MOST_NUMBERS, MOST_PLACES = 2**25, 2**15


class ContinuedConv(nn.Module):
    """A causal convolution over a video that comes in chunks `[B, C, frames, H, W]`.

    Edges are replicated as the stock layer does it: in space always, in time before the first
    chunk. Later ones see the frames before them that no output has had in its place yet.
    `conv_cache` is the stock layer's protocol.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.conv = stock.conv
        self.reach = stock.time_pad  # frames before an output's own
        self.step = stock.conv.stride[0]
        self.space = (stock.width_pad, stock.width_pad, stock.height_pad, stock.height_pad)
        self.past: Tensor | None = None

    def forward(self, inputs: Tensor, conv_cache: None = None) -> tuple[Tensor, None]:
        if self.past is None:
            self.past = inputs[:, :, :1].expand(-1, -1, self.reach, -1, -1)
        inputs = torch.cat([self.past, inputs], dim=2)
        outputs = (inputs.shape[2] - self.reach - 1) // self.step + 1
        self.past = inputs[:, :, outputs * self.step :].clone()
        inputs = F.pad(inputs, (*self.space, 0, 0), mode="replicate")
        return self.conv(inputs), None


def continuing(part: Any) -> Any:
    """An encoder or decoder over the same weights that goes on from chunk to chunk; `part` is not
    touched.

    The stock switch for this, `_enable_framewise_decoding`, also drops the padding in space, which
    these convolutions are built to be given.
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

    Its convolutions are causal and go on from one chunk of `frames` to the next. Its attention is
    causal too, over the frames of one place, so it takes all frames of some places at a time: to go
    on from chunk to chunk it would have to keep keys and values, 46 GB for 667 frames of a tile of
    256 x 256. What is kept of the whole clip is the first attention's input, at half the height and
    width, twice: 2 x 5.2 GiB for that tile, where all frames at once take five times 10.4 GiB, at
    the full size (193 MB for 637 MB, measured on 121 frames of 64 x 64 with fewer places at a
    time). The result is equal but for the rounding of sums, which goes by their size.
    """

    def __init__(self, stock: Any, frames: int) -> None:
        super().__init__()
        self.stock, self.frames = stock, frames

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Moments `[B, C, f, h, w]` of `[B, 3, F, H, W]`, and a cache that there is not."""
        video = pixels
        for layers, step, attention in _steps(continuing(self.stock)):
            video = self._by_frames(layers, step, video, replace=video is not pixels)
            if attention is not None:
                self._attend(*attention, video)
        return video, None

    def _by_frames(self, layers: list[Layer], step: int, video: Tensor, *, replace: bool) -> Tensor:
        """What the layers make of a video, one frame of each `step`; in its own memory if it fits
        there and may be replaced."""
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
        """The first has a frame more, as a multiple of latent frames plus one needs, and the last
        one the rest."""
        count = max(1, (video.shape[2] - 1) // self.frames)
        for index in range(count):
            first = index * self.frames + (index > 0)
            last = (index + 1) * self.frames + 1 if index + 1 < count else None
            yield video[:, :, first:last]

    def _attend(self, norm: Layer, attention: Layer, video: Tensor) -> None:
        """Adds attention over the frames of each place, in place."""
        normed = self._by_frames([norm], 1, video, replace=False)
        batch, channels, frames, height, width = video.shape
        places = min(MOST_PLACES, MOST_NUMBERS // (frames * channels)) // batch
        rows = max(1, places // width)
        for part, target in zip(normed.split(rows, 3), video.split(rows, 3), strict=True):
            lines = part.permute(0, 3, 4, 2, 1)  # [B, rows, W, F, C]
            made = attention(lines.flatten(0, 2).contiguous()).view(lines.shape)
            target += made.permute(0, 4, 3, 1, 2)


def _steps(encoder: Any) -> Iterator[tuple[list[Layer], int, tuple[Layer, Layer] | None]]:
    """The encoder as causal layers, how many frames they make one of, and the norm and attention
    that follow them."""
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
    """Without the cache that stock layers return beside their result."""
    return lambda video: layer(video)[0]


def _on_channels(layer: Layer) -> Layer:
    """A layer over the last dimension as one over the channels of `[B, C, F, H, W]`."""
    return lambda video: layer(video.movedim(1, -1)).movedim(-1, 1)
