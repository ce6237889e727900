"""Help to build tiny models: random weights that behave like trained ones where tests need it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def amplify_attention(transformer: Any, gates: Iterable[Tensor], norms: Iterable[Any]) -> None:
    """Let attention have a visible effect on the output of random weights.

    Opens the gates, scales logits so that they can single tokens out, and makes the output so small
    that the untrained loss is near that of predicting zero.

    gates: views of the parameters that are added to attention's gates. norms: of queries and keys;
    None for one that a block lacks.
    """
    for gate in gates:
        gate += 1
    for norm in norms:
        if norm is not None:
            norm.weight.fill_(1.5)
    transformer.proj_out.weight.normal_(std=0.5 * transformer.proj_out.in_features**-0.5)


@torch.no_grad()
def latent_statistics(
    vae: Any, frames: int, height: int, width: int
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel of moving waves.

    They are rounded, so that the last bits of a machine's arithmetic do not reach the model's
    files.
    """
    t, y, x = (torch.linspace(0, 1, n) for n in (frames, height, width))
    t, y, x = t[:, None, None], y[:, None], x
    waves = torch.stack(
        [
            torch.sin(6 * x + 2 * t) * torch.cos(5 * y),
            torch.sin(11 * (x - t) + 7 * y),
            torch.cos(9 * (y + t) - 23 * x),
        ]
    )
    latents = vae.encode(0.8 * waves[None]).latent_dist.mode()[0].flatten(1)
    mean, std = ([round(x, 4) for x in s.tolist()] for s in (latents.mean(1), latents.std(1)))
    return mean, std


def t5_encoder(model: str, config: str, width: int, max_length: int) -> tuple[Any, Any]:
    """Return a tokenizer of bytes, and an encoder of two layers for it.

    model, config: classes of transformers: T5 or a variant of it.
    """
    import transformers

    tokenizer = transformers.ByT5Tokenizer(model_max_length=max_length)
    settings = getattr(transformers, config)(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, getattr(transformers, model)(settings).eval()
