"""Captions of Mochi 1: T5 embeddings in the sequence."""

from __future__ import annotations

from typing import Any

import torch

from ..joint import JointText, pad, trim
from ..text import Text


class MochiText(JointText):
    caption_tokens = 255  # and </s>

    def encode(self, pipe: Any, caption: str) -> Text:
        # One caption a call: the pipeline zeroes an empty one only if it is the last of its batch.
        with torch.no_grad():
            embeds, mask, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        return {"prompt_embeds": trim(embeds[0], mask[0])}

    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        texts = {"prompt": text}
        if negative is not None:
            texts["negative_prompt"] = negative
        # Pad to one length: the pipeline stacks them.
        embeds, mask = pad([text["prompt_embeds"] for text in texts.values()])
        inputs: dict[str, Any] = {"guidance_scale": guidance}
        for name, row, valid in zip(texts, embeds, mask, strict=True):
            inputs |= {f"{name}_embeds": row[None], f"{name}_attention_mask": valid[None]}
        return inputs
