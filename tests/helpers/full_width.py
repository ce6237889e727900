"""Blocks of each family's published model at full width, with random weights, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from longreel.trainer.families import FAMILIES
from longreel.trainer.families.base import ModelFamily


@dataclass(frozen=True)
class Case:
    """A few blocks of a model; the rest is diffusers' default, the published width.

    latents: `(frames, height, width)` at the target length. small: a grid with a ragged tail whose
    dense mask fits, and its radial density.
    """

    family: ModelFamily
    blocks: dict[str, int]
    latents: tuple[int, int, int]
    small: tuple[int, int, int]
    density: float
    text: dict[str, int] = field(default_factory=dict)  # widths of its further embeddings


CASES = {
    # 41 latent frames of 720 x 1280: 147,600 tokens
    "wan": Case(FAMILIES["wan"], {"num_layers": 2}, (41, 90, 160), (21, 18, 32), 0.679),
    # one dual and one single block at 253 frames of 720 x 1280: 230,400 tokens and text
    "hunyuan": Case(
        FAMILIES["hunyuan"],
        {"num_layers": 1, "num_single_layers": 1},
        (64, 90, 160),
        (21, 18, 32),
        0.704,
        {"pooled_prompt_embeds": 768},
    ),
    # a block, and the last one, which is without text output, at 331 frames of 480 x 848
    "mochi": Case(FAMILIES["mochi"], {"num_layers": 2}, (56, 60, 106), (21, 18, 32), 0.704),
}


def save_blocks(case: Case, folder: Path) -> None:
    """Save the blocks so that they load as a run loads them: some modules may stay in fp32."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = getattr(diffusers, case.family.names.transformer)(**case.blocks)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    assert (heads, dim) == (40 if case.family.name == "wan" else 24, 128)
    if case.family.name == "mochi":  # zero by default, which makes its RoPE the identity
        with torch.no_grad():
            model.pos_frequencies.normal_(std=0.3)
    model.to(torch.bfloat16).save_pretrained(folder / "transformer")


def load(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    return case.family.loader.load_transformer(str(folder), None, dtype).cuda().train()


def inputs(
    case: Case, model: Any, size: tuple[int, int, int], texts: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(2)
    shape = (len(texts), model.config.in_channels, *size)
    clean = torch.randn(shape, device="cuda", generator=generator)
    embeds = [
        {
            "prompt_embeds": torch.randn(n, 4096, device="cuda", generator=generator),
            **{
                name: torch.randn(width, device="cuda", generator=generator)
                for name, width in case.text.items()
            },
        }
        for n in texts
    ]
    return clean, {name: x.cuda() for name, x in case.family.text.collate(embeds).items()}


def guidance(case: Case) -> float | None:
    return 1.0 if case.family.name == "hunyuan" else None
