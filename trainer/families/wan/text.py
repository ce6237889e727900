"""Captions of Wan 2.1: UMT5 embeddings, padded with zeros that the model attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..text import Text, TextConditioning

TEXT_TOKENS = 512  # the pipeline's call pads to it; `encode_prompt` alone would pad to 226


class WanText(TextConditioning):
    context_tokens = TEXT_TOKENS
    caption_tokens = TEXT_TOKENS - 1  # and </s>

    def encode(self, pipe: Any, caption: str) -> Text:
        with torch.no_grad():
            embeds, _ = pipe.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
        # The model attends to the padding, but it is all zeros: leaving it out loses nothing.
        filled = embeds[0].ne(0).any(dim=1).nonzero()
        length = int(filled.max()) + 1 if len(filled) else 1
        return {"prompt_embeds": embeds[0, :length].cpu().clone()}

    def collate(self, texts: Sequence[Text]) -> Text:
        return {"encoder_hidden_states": _pad([text["prompt_embeds"] for text in texts])}

    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        inputs: dict[str, Any] = {"prompt_embeds": _pad([text["prompt_embeds"]])}
        if negative is not None:
            inputs["negative_prompt_embeds"] = _pad([negative["prompt_embeds"]])
        return inputs | {"guidance_scale": guidance}


def _pad(embeds: Sequence[Tensor]) -> Tensor:
    """Pad prompts with zeros to `[B, TEXT_TOKENS, D]`, as the pipeline does."""
    batch = embeds[0].new_zeros(len(embeds), TEXT_TOKENS, embeds[0].shape[1])
    for row, prompt in zip(batch, embeds, strict=True):
        row[: len(prompt)] = prompt
    return batch
