"""Say where sequence parallelism cuts a transformer's sequence into one part per rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SequenceSplit:
    """Names the places at which tokens of the video can be cut.

    embedder: the module that makes the video's tokens. rope_dim: the dimension of a RoPE table that
    counts tokens.
    """

    embedder: str
    rope_dim: int

    def cut(self, embedded: Tensor, part: slice, tokens: int) -> Tensor:
        """Cut the embedder's output, over all `tokens` of the video, down to `part`.

        The result has the layout of the input: the model's own reshaping makes `[B, part, C]` of
        it. embedded: `[B, tokens, C]` or any shape that reshapes to it.
        """
        return embedded.reshape(-1, tokens, embedded.shape[-1])[:, part]
