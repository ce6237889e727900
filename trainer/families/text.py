"""Captions: from the pipeline's text encoder to the cache, the transformer and the pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .names import ModelNames

Text = dict[str, Tensor]


@dataclass(frozen=True)
class TextConditioning(ABC):
    """Encodes captions as a family's pipeline does.

    sequence_tokens: the most text tokens in the self-attention sequence, after the video's.
    context_tokens: text tokens that the video attends to by cross-attention instead.
    caption_tokens: tokens of a caption that the text encoder reads; the rest is cut off.
    """

    names: ModelNames

    sequence_tokens: ClassVar[int] = 0
    context_tokens: ClassVar[int] = 0
    caption_tokens: ClassVar[int]

    @property
    def max_tokens(self) -> int:
        """The most text tokens that the transformer sees, however it attends to them."""
        return self.sequence_tokens or self.context_tokens

    @abstractmethod
    def encode(self, pipe: Any, caption: str) -> Text:
        """Return, on the CPU, what the pipeline feeds the transformer for a caption.

        This is what the cache stores. Padding that `collate` restores exactly is left out.
        """

    @abstractmethod
    def collate(self, texts: Sequence[Text]) -> Text:
        """Return a batch of `encode` results as keyword arguments of the transformer."""

    @abstractmethod
    def pipeline_inputs(self, text: Text, negative: Text | None, guidance: float) -> dict[str, Any]:
        """Return keyword arguments of the pipeline's call, batch 1, for `encode` results.

        negative: None unless `Geometry.uses_negative`.
        """
