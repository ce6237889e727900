"""Captions of HunyuanVideo: Llama's embeddings in the sequence, CLIP's pooled one beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...config.values import ConfigError
from ..joint import JointText, pad, trim
from ..text import Text


class HunyuanText(JointText):
    def encode(self, pipe: Any, caption: str) -> Text:
        with torch.no_grad():
            embeds, pooled, mask = pipe.encode_prompt(caption)
        text = trim(embeds[0], mask[0])
        if not len(text):  # even "" ends with <|eot_id|>; a mean over no token would be NaN
            raise ConfigError(
                "The prompt template alone fills the text encoder's window, so captions do not "
                "reach the model: the folder tokenizer/ is not HunyuanVideo's. Fetch it again with "
                f"`hf download {self.names.repository} --include 'tokenizer/*'`."
            )
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled[0].cpu().clone()}

    def collate(self, texts: Sequence[Text]) -> Text:
        pooled = torch.stack([text["pooled_prompt_embeds"] for text in texts])
        return super().collate(texts) | {"pooled_projections": pooled}

    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        inputs = _prompt(text)
        if negative is None:
            return inputs | {"guidance_scale": guidance}
        inputs |= {f"negative_{name}": x for name, x in _prompt(negative).items()}
        return inputs | {"true_cfg_scale": guidance, "guidance_scale": 1.0}


def _prompt(text: Text) -> dict[str, Tensor]:
    """Return the pipeline's arguments for a prompt."""
    embeds, mask = pad([text["prompt_embeds"]])
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "pooled_prompt_embeds": text["pooled_prompt_embeds"][None],
    }
