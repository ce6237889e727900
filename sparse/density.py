"""The width of a pattern that meets a density, so that patterns can be compared at equal cost."""

from __future__ import annotations

from functools import cache

from .grid import TokenGrid
from .layout import kept_blocks, token_densities
from .patterns import SparsePattern

CLOSE = 1e-4  # a density this near its target needs no better width
NARROW = 1e-3  # relative: widths this near are one; densities then differ by about CLOSE


def layer_density(
    pattern: SparsePattern, grid: TokenGrid, block: int = 128, heads: int | None = None
) -> float:
    """Executed share of all token pairs of one layer, text counted, without listing the blocks.

    heads: of the model, whose share of each layout counts; None: all layouts count alike.
    """
    kept = kept_blocks(pattern, grid, block)
    shares = token_densities(kept, block, len(grid))
    if heads is None or len(shares) == 1:  # one matrix may serve several orders
        return sum(shares) / len(shares)
    return sum(shares[layout] for layout in pattern.head_layouts(heads)) / heads


def with_density(
    pattern: SparsePattern,
    grid: TokenGrid,
    target: float,
    block: int = 128,
    heads: int | None = None,
) -> tuple[SparsePattern, float]:
    """The pattern at the width that comes nearest to a target density, and its density there.

    By bisection over `pattern.widths`, on what `layer_density` says of a sparse layer. A pattern
    whose widths are few gets the nearest, one that meets the target as it is stays so. Widths are
    rounded to six digits, so that what a run records can be read and typed.

    Raises:
        ValueError: if the pattern has no width, or for a target that no width reaches.
    """
    if not 0 < target <= 1:
        raise ValueError(f"density={target} must be above 0 and at most 1.")
    low, high = pattern.widths(grid, block)

    @cache  # widths that a pattern rounds to the same value are built once
    def density(candidate: SparsePattern) -> float:
        return layer_density(candidate, grid, block, heads)

    if abs(density(pattern) - target) <= CLOSE:
        return pattern, density(pattern)

    def at(width: float) -> SparsePattern:
        return pattern.with_width(float(f"{width:.6g}"), grid, block)

    def stands(width: float, reached: float) -> bool:
        """Whether a width past the ends, if there is one, changes nothing."""
        try:
            return at(width) not in ends and abs(density(at(width)) - reached) <= CLOSE
        except ValueError:
            return False

    ends = at(low), at(high)
    least, most = density(ends[0]), density(ends[1])
    if not least - CLOSE <= target <= most + CLOSE:
        message = (
            f"density={target:.4g} is out of reach: {pattern.width} from {low:.6g} to {high:.6g} "
            f"takes {pattern} from {least:.4f} to {most:.4f} on {grid}."
        )
        if target > most and stands(2 * high, most):
            message += _saturates(pattern, f"doubling {pattern.width} again adds")
        if target < least and stands(low / 2, least):
            message += _saturates(pattern, f"halving {pattern.width} again drops")
        if target < least and grid.text:
            text = 1 - (grid.video / len(grid)) ** 2
            message += f" Text, which is always dense, takes {text:.4f} of it."
        raise ValueError(message)
    best = min(ends, key=lambda candidate: abs(density(candidate) - target))
    halve = False
    while abs(density(best) - target) > CLOSE and high - low > NARROW * high:
        # In turns where a straight line between the ends meets the target, and half way: most of
        # the curves are smooth, but some are stairs.
        share = 0.5 if halve or most <= least else (target - least) / (most - least)
        middle = low + min(max(share, 0.02), 0.98) * (high - low)
        candidate, halve = at(middle), not halve
        if density(candidate) < target:
            low, least = middle, density(candidate)
        else:
            high, most = middle, density(candidate)
        best = min(best, candidate, key=lambda candidate: abs(density(candidate) - target))
    return best, density(best)


def nearest_density(
    pattern: SparsePattern,
    grid: TokenGrid,
    target: float,
    block: int = 128,
    heads: int | None = None,
) -> tuple[SparsePattern, float, bool]:
    """As `with_density`, but the end of a pattern's widths that is nearest where none reaches the
    target, and a pattern without a width as it is; and whether the target was within reach."""
    ends = [pattern]
    if pattern.width is not None:
        try:
            return *with_density(pattern, grid, target, block, heads), True
        except ValueError:
            ends += [pattern.with_width(w, grid, block) for w in pattern.widths(grid, block)]
    found = {end: layer_density(end, grid, block, heads) for end in ends}
    nearest = min(found, key=lambda end: abs(found[end] - target))
    return nearest, found[nearest], False


def _saturates(pattern: SparsePattern, change: str) -> str:
    return (
        f" It saturates: {change} no block; the rest is up to the other settings of "
        f"{type(pattern).__name__}."
    )
