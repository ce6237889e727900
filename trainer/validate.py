"""Held-out loss: the flow-matching loss of clips that are never trained on, at fixed noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..data.dataset import LatentDataset
from .families.base import ModelFamily
from .flow import flow_matching_loss


@torch.no_grad()
def heldout_loss(
    family: ModelFamily,
    transformer: nn.Module,
    clips: LatentDataset,
    *,
    sigmas: Sequence[float],
    latent_frames: int,
    seed: int,
    device: torch.device,
) -> float:
    """Mean loss over clips and noise levels, always under the same noise: only weights move it.

    latent_frames: how many of each clip are used, from its start: the VAEs are causal, so these
        are the latents of the shorter clip.
    """
    losses = []
    with evaluating(transformer):
        for index in range(len(clips)):
            clip = clips[index]
            clean = clip["latents"][None, :, :latent_frames].float()
            text = {
                key: value.to(device) for key, value in family.collate_text([clip["text"]]).items()
            }
            for level, sigma in enumerate(sigmas):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index * 101 + level)
                noise = torch.randn(clean.shape, generator=generator)
                loss = flow_matching_loss(
                    family,
                    transformer,
                    clean.to(device),
                    text,
                    torch.full((1,), sigma, device=device),
                    noise.to(device),
                )
                losses.append(loss.item())
    return sum(losses) / len(losses)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout and checkpointing inside, in training mode again afterwards if it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
