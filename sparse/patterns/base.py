"""A sparse attention pattern: a predicate over tokens, and a rule that makes blocks of it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ..grid import TokenGrid


@runtime_checkable
class SparsePattern(Protocol):
    """A static pattern: a frozen dataclass whose fields are its parameters.

    `keep` is the definition, `blocks` what is computed. Neither depends on queries, keys or values.
    """

    def keep(self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128) -> Tensor:
        """Whether query token `q` attends to key token `kv` before blocks are formed.

        `q` and `kv` are int64 positions in the sequence and broadcast against each other; the
        result is bool in the broadcast shape. Text attends to, and is attended by, everything.
        A pattern may use `block` as its finest width, never to round.
        """
        ...

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Kept blocks among the video tokens, bool `[n, n]` with `n = ceil(grid.video / block)`.

        The layout adds the text rows and columns. Memory is that of the result, not of tokens
        squared.
        """
        ...
