"""Flow matching: noise levels, noising and the loss.

sigma is the noise level in [0, 1]: noisy = (1 - sigma) * clean + sigma * noise. The family decides
which timestep a model gets for a sigma, and whether it predicts noise - clean or its negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config.schema import Sigma
from .families.base import ModelFamily
from .families.text import Text


def sample_sigmas(batch: int, config: Sigma, generator: torch.Generator) -> Tensor:
    """Draw noise levels `[batch]`, fp32 on the CPU.

    Logit-normal is from Esser et al. 2024, section 3.1; the shift from their section 5.3.2.
    """
    if config.name == "uniform":
        sigma = torch.rand(batch, generator=generator)
    else:
        normal = torch.randn(batch, generator=generator)
        sigma = torch.sigmoid(config.mean + config.std * normal)
    return config.shift * sigma / (1 + (config.shift - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return noisy fp32 latents for clean ones `[B, ...]` at noise levels `[B]`."""
    sigma = sigma.float().view(-1, *[1] * (clean.dim() - 1))
    return (1 - sigma) * clean.float() + sigma * noise.float()


def sample(clean: Tensor, config: Sigma, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noise like `clean` and noise levels `[B]` of one training step, fp32 on its device.

    generator: on the CPU, so that a seed gives the same values on every device.
    """
    sigma = sample_sigmas(clean.shape[0], config, generator)
    noise = torch.randn(clean.shape, generator=generator)
    return noise.to(clean.device), sigma.to(clean.device)


def flow_matching_loss(
    family: ModelFamily,
    transformer: nn.Module,
    clean: Tensor,
    text: Text,
    sigma: Tensor,
    noise: Tensor,
    guidance: float | None = None,
) -> Tensor:
    """Return the mean squared error of the prediction, fp32, in training and validation.

    clean, noise: latents `[B, C, f, h, w]`; text: from `collate_text`; sigma: `[B]`; all on the
    transformer's device. guidance: as `NoisingConvention.predict` takes it.
    """
    noisy = add_noise(clean, noise, sigma)
    prediction = family.noising.predict(transformer, noisy, sigma, text, guidance)
    return F.mse_loss(prediction, family.noising.target(clean.float(), noise.float()))
