"""Random weights, latents and text: all that a training step needs, without files."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn

from longreel.trainer.families.base import ModelFamily
from longreel.trainer.families.published import blank_transformer
from longreel.trainer.job import Job

STD = 0.02  # keeps a few dozen random blocks of thousands of channels finite in bf16


def untrained(
    family: ModelFamily, device: torch.device, shared: dict[str, nn.Parameter] | None = None
) -> ModelFamily:
    """Return the family with a loader that gives random weights instead of reading files.

    shared: parameters by name that all models use, each adding what is missing; for frozen bases.
    """

    class Untrained(type(family.loader)):
        def blank_transformer(self, path: str, revision: str | None) -> Any:
            return blank_transformer(family, path, revision)

        def load_transformer(self, path: str, revision: str | None, dtype: torch.dtype) -> Any:
            return random_transformer(family, path, revision, dtype, device, shared)

    return replace(family, loader=Untrained(**vars(family.loader)))


def random_transformer(
    family: ModelFamily,
    path: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    shared: dict[str, nn.Parameter] | None = None,
) -> Any:
    """Build what `Loader.load_transformer` returns on `device`, always with the same weights.

    Each parameter is made in its place and dtype: no more is ever held than the model itself.
    shared: as `untrained` takes it; parameters already in it are reused.
    """
    from diffusers.models.modeling_utils import no_init_weights

    blank = blank_transformer(family, path, revision)
    # As when diffusers loads: buffers, which no file holds, are computed; parameters stay empty.
    with no_init_weights(), init_empty_weights():
        model = type(blank).from_config(blank.config)
    fp32 = set(model._keep_in_fp32_modules or ())
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        *owner, leaf = name.split(".")
        own = torch.float32 if fp32.intersection(name.split(".")) else dtype
        made = None if shared is None else shared.get(name)
        if made is None or (made.shape, made.dtype) != (parameter.shape, own):
            values = torch.empty(parameter.shape, dtype=own, device=device)
            if leaf == "weight" and parameter.ndim == 1:  # of a norm
                values.fill_(1)
            else:
                values.normal_(std=STD, generator=generator)
            made = nn.Parameter(values)
        if shared is not None:
            shared[name] = made
        setattr(model.get_submodule(".".join(owner)), leaf, made)
    return model.to(device).eval()


def random_batch(
    job: Job, dtype: torch.dtype, part: tuple[int, int] = (0, 1), frames: int | None = None
) -> dict[str, Any]:
    """Build a batch like the data loader's on the CPU: noise as latents, captions of full length.

    part: as `LatentDataset` takes it. frames: latent frames, None for the job's.
    """
    config = job.config
    transformer = blank_transformer(job.family, job.model_path, config.model.revision)
    sizes, inputs = transformer.config, inspect.signature(transformer.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width = sizes.get("text_dim") or sizes["text_embed_dim"]
    text = {"prompt_embeds": noise(job.family.text.max_tokens, width)}
    if "pooled_projections" in inputs:
        text["pooled_prompt_embeds"] = noise(sizes["pooled_projection_dim"])
    batch, shape = config.train.batch, [*job.latent_shape(job.frames)]
    shape[1] = frames or shape[1]
    latents, (index, parts) = noise(batch, *shape), part
    if parts > 1:
        length = -(-math.prod(shape) // parts)
        padded = F.pad(latents.flatten(1), (0, parts * length - math.prod(shape)))
        latents = padded[:, index * length : (index + 1) * length]
    return {
        "latents": latents,
        "shape": shape,
        "texts": [text] * batch,
        "ids": ["noise"] * batch,
    }
