"""What the models share whose attention spans text and video: `[video, text]`, text last."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sparse.grid import TokenGrid
from ..config.values import ConfigError
from .base import Geometry, ModelFamily, Text


class JointFamily(ModelFamily):
    """Text tokens are queries and keys beside the video's.

    Padding is cut off wherever it can be: it would cost attention, and a mask costs SDPA its fused
    kernels. What remains, in a batch of different lengths, is told to the attention as lengths.
    """

    text_tokens = 256
    caption_tokens = 256

    def extended_frames(self, native: int, factor: int, geometry: Geometry) -> int:
        # By latent frames: 125 at a compression of 4 are 32, and 64 of them are 253.
        return (geometry.latent_frames(native) * factor - 1) * geometry.temporal + 1

    def sequence(
        self, transformer: Any, inputs: Mapping[str, Any]
    ) -> tuple[TokenGrid, Sequence[int] | None]:
        latents, mask = inputs["hidden_states"], inputs["encoder_attention_mask"]
        grid = self.grid(latents.shape, self.patch_of(transformer.config), mask.shape[1])
        lengths = mask.bool().sum(dim=1).tolist()
        return grid, [grid.video + length for length in lengths]

    @abstractmethod
    def patch_of(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token, from the transformer's config."""

    def collate_text(self, texts: Sequence[Text]) -> Text:
        embeds, mask = pad([text["prompt_embeds"] for text in texts])
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def trim(embeds: Tensor, mask: Tensor) -> Tensor:
    """The rows `[tokens, D]` of a prompt without its padding, on the CPU.

    embeds: `[L, D]`; mask: `[L]`, true for tokens of the prompt. Raises ConfigError for padding on
    the left, which no pipeline of ours expects.
    """
    length = int(mask.bool().sum())
    if not mask[:length].bool().all():
        raise ConfigError(
            "The tokenizer pads on the left, but the model was trained with padding on the right: "
            "set padding_side to right in tokenizer/tokenizer_config.json."
        )
    return embeds[:length].cpu().clone()


def pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, L, D]` and a mask `[B, L]` bool of prompts `[tokens, D]`.

    L is the longest prompt's length, and at least 1. A prompt without tokens gives a row that is
    masked throughout.
    """
    length = max(1, *(len(prompt) for prompt in prompts))
    embeds = prompts[0].new_zeros(len(prompts), length, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for index, prompt in enumerate(prompts):
        embeds[index, : len(prompt)] = prompt
        mask[index, : len(prompt)] = True
    return embeds, mask
