"""Parts that families share whose attention spans text and video: `[video, text]`, text last.

Padding of the text is cut off wherever possible: it would cost attention, and a mask would cost
SDPA its fused kernels. In a batch of captions of several lengths, attention gets the lengths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sparse.grid import TokenGrid
from ..config.values import ConfigError
from .attention import AttentionAdapter
from .geometry import Geometry, token_grid
from .text import Text, TextConditioning


class JointGeometry(Geometry):
    def extended_frames(self, native: int, factor: int) -> int:
        # Counted in latent frames: 125 frames at a compression of 4 are 32, and 64 of them are 253.
        return (self.latent_frames(native) * factor - 1) * self.temporal + 1


class JointAttention(AttentionAdapter):
    def sequence(
        self, transformer: Any, inputs: Mapping[str, Any]
    ) -> tuple[TokenGrid, Sequence[int] | None]:
        latents, mask = inputs["hidden_states"], inputs["encoder_attention_mask"]
        grid = token_grid(latents.shape, self.patch(transformer.config), mask.shape[1])
        lengths = mask.bool().sum(dim=1).tolist()
        return grid, [grid.video + length for length in lengths]

    @abstractmethod
    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return latent frames, rows and columns of a token, from the transformer's config."""


class JointText(TextConditioning):
    """Text tokens are queries and keys beside the video's."""

    sequence_tokens = 256
    caption_tokens = 256

    def collate(self, texts: Sequence[Text]) -> Text:
        embeds, mask = pad([text["prompt_embeds"] for text in texts])
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def trim(embeds: Tensor, mask: Tensor) -> Tensor:
    """Return the rows `[tokens, D]` of a prompt without its padding, on the CPU.

    embeds: `[L, D]`; mask: `[L]`, true for tokens of the prompt. Raises ConfigError for padding on
    the left, with which none of the models was trained.
    """
    length = int(mask.bool().sum())
    if not mask[:length].bool().all():
        raise ConfigError(
            "The tokenizer pads on the left, but the model was trained with padding on the right: "
            "set padding_side to right in tokenizer/tokenizer_config.json."
        )
    return embeds[:length].cpu().clone()


def pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return embeddings `[B, L, D]` and a mask `[B, L]` bool of prompts `[tokens, D]`.

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
