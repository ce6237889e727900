"""A sparse attention pattern: a predicate over tokens, and a rule that makes blocks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ..grid import TokenGrid


class SparsePattern(ABC):
    """A static pattern: a frozen dataclass whose fields are its parameters.

    `keep` is the definition, `blocks` what is computed. Neither depends on queries, keys or values.
    Heads may follow different layouts, and a layout may take the video tokens in an order of its
    own, so that what a token attends to lies together.

    width: the field that a density target sets (`sparse.density`); None if there is none.
    """

    width: ClassVar[str | None] = None

    @abstractmethod
    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        """Whether query token `q` attends to key token `kv` before blocks are formed.

        `q` and `kv` are int64 raster positions in the sequence, whatever the layout's order, and
        broadcast against each other; the result is bool in the broadcast shape. Text attends to,
        and is attended by, everything. A pattern may use `block` as its finest width, never to
        round.
        """

    @abstractmethod
    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Kept blocks among the video tokens, bool `[n, n]` or `[layouts, n, n]`.

        n = ceil(grid.video / block). Blocks are runs of positions in the layout's `order`. The
        layout adds the text rows and columns. Memory is that of the result, not of tokens squared.
        """

    def order(self, grid: TokenGrid, block: int) -> Tensor | None:
        """Raster position of the token that stands at each position; None: raster order.

        int64 `[grid.video]` for all layouts or `[layouts, grid.video]`, each a permutation. One
        block mask under several orders is several layouts too. Text stays last.
        """
        return None

    def head_layouts(self, heads: int) -> Sequence[int]:
        """The layout of each head."""
        return [0] * heads

    def with_width(self, value: float, grid: TokenGrid, block: int) -> Self:
        """The same pattern with its width at `value`; a pattern may round it to what it can take.

        Raises:
            ValueError: if the pattern has no width.
        """
        if self.width is None:
            raise ValueError(f"{type(self).__name__} has no width that a density could set.")
        this: Any = self  # a dataclass, which the type system cannot ask of a base class
        return replace(this, **{self.width: value})

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        """The smallest and largest sensible width; density grows from the first to the second.

        Raises:
            ValueError: if the pattern has no width.
        """
        raise ValueError(f"{type(self).__name__} has no width that a density could set.")

    def note(self, grid: TokenGrid, block: int) -> str | None:
        """A sentence for the user where a parameter had to be rounded; None if none was."""
        return None
