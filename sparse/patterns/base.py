"""`SparsePattern`: a predicate over token pairs, and a rule that turns it into blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ..grid import TokenGrid


class SparsePattern(ABC):
    """The base of static patterns, frozen dataclasses whose fields are their parameters.

    `keep` defines the pattern; `blocks` says what is computed. Neither depends on queries, keys or
    values. Heads may use different layouts, and a layout may reorder the video tokens, so that the
    tokens which attend to each other lie together.

    width: name of the field that a density target sets (`sparse.density`); None if there is none.
    """

    width: ClassVar[str | None] = None

    @abstractmethod
    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        """Return whether query token `q` attends to key token `kv`, before blocks are formed.

        `q` and `kv` are int64 raster positions in the sequence, whatever the layout's order, and
        broadcast against each other; the result is bool in the broadcast shape. Text attends to
        everything and everything attends to text. A pattern may use `block` as its smallest window,
        but never rounds to blocks here.
        """

    @abstractmethod
    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        """Return the kept blocks among the video tokens, bool `[n, n]` or `[layouts, n, n]`.

        n = ceil(grid.video / block). Blocks are runs of positions in the layout's `order`.
        `build_layout` adds the text rows and columns. Memory must grow with the result, not with
        tokens squared.
        """

    def order(self, grid: TokenGrid, block: int) -> Tensor | None:
        """Return the raster position of the token at each position; None means raster order.

        The result is int64 `[grid.video]` for all layouts or `[layouts, grid.video]`, each row a
        permutation. One block mask under several orders counts as several layouts. Text stays last.
        """
        return None

    def head_layouts(self, heads: int) -> Sequence[int]:
        """Return the layout index of each head."""
        return [0] * heads

    def with_width(self, value: float, grid: TokenGrid, block: int) -> Self:
        """Return the pattern with its width set to `value`, which a pattern may round.

        Raises:
            ValueError: if the pattern has no width.
        """
        if self.width is None:
            raise ValueError(f"{type(self).__name__} has no width that a density could set.")
        this: Any = self  # subclasses are dataclasses, which types cannot express here
        return replace(this, **{self.width: value})

    def widths(self, grid: TokenGrid, block: int) -> tuple[float, float]:
        """Return the smallest and the largest sensible width; density grows between them.

        Raises:
            ValueError: if the pattern has no width.
        """
        raise ValueError(f"{type(self).__name__} has no width that a density could set.")

    def note(self, grid: TokenGrid, block: int) -> str | None:
        """Return a sentence for the user if a parameter had to be rounded, else None."""
        return None
