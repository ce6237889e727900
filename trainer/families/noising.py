"""Ask a model about noisy latents: its timestep, its target, its prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .text import Text


@dataclass(frozen=True)
class NoisingConvention:
    """Flow matching as a model was trained with it.

    sigma is the noise level in [0, 1] and noisy = (1 - sigma) clean + sigma noise. Time usually
    runs from the video to noise, as sigma does. reversed: time, and the velocity with it, run from
    noise to the video.
    """

    reversed: bool = False

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the transformer's timestep `[B]` for noise levels `[B]`."""
        return 1000 * (1 - sigma) if self.reversed else 1000 * sigma

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return the velocity that the transformer is trained to predict."""
        return clean - noise if self.reversed else noise - clean

    def predict(
        self,
        transformer: Any,
        noisy: Tensor,
        sigma: Tensor,
        text: Text,
        guidance: float | None = None,
    ) -> Tensor:
        """Return the transformer's prediction for latents `[B, C, f, h, w]`, in their dtype.

        text: from `TextConditioning.collate`, on the same device. guidance: the input of a model
        with `guidance_embeds`; None for others.
        """
        dtype = getattr(transformer, "module", transformer).dtype  # of the frozen base
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in text.items()}
        if guidance is not None:
            inputs["guidance"] = torch.full_like(sigma, 1000 * guidance)
        out = transformer(
            hidden_states=noisy.to(dtype),
            timestep=self.timestep(sigma),
            return_dict=False,
            **inputs,
        )
        return out[0].to(noisy.dtype)
