"""Find the width at which a pattern has a given density, to compare patterns at equal cost."""

from __future__ import annotations

from functools import cache

from .grid import TokenGrid
from .layout import kept_blocks, token_densities
from .patterns import SparsePattern

CLOSE = 1e-4  # a density this near its target is accepted
NARROW = 1e-3  # relative: the search ends at widths this near; densities then differ by about CLOSE


def layer_density(
    pattern: SparsePattern, grid: TokenGrid, block: int = 128, heads: int | None = None
) -> float:
    """Return the share of all token pairs that one layer computes, text included.

    It is counted on the matrix of kept blocks, without building the kernels' lists.

    heads: number of heads, to weight each layout by the heads that use it; None weights all
        layouts equally.
    """
    kept = kept_blocks(pattern, grid, block)
    shares = token_densities(kept, block, len(grid))
    if heads is None or len(shares) == 1:  # one matrix may stand for several orders
        return sum(shares) / len(shares)
    return sum(shares[layout] for layout in pattern.head_layouts(heads)) / heads


def with_density(
    pattern: SparsePattern,
    grid: TokenGrid,
    target: float,
    block: int = 128,
    heads: int | None = None,
) -> tuple[SparsePattern, float]:
    """Return the pattern at the width that comes nearest to a target density, and that density.

    The width is found by bisection over `pattern.widths`, by the `layer_density` of a sparse layer.
    A pattern that meets the target already is returned unchanged; one with few possible widths gets
    the nearest. Widths are rounded to six digits, so that recorded ones can be read and typed.

    Raises:
        ValueError: if the pattern has no width, or no width meets the target.
    """
    if not 0 < target <= 1:
        raise ValueError(f"density={target} must be above 0 and at most 1.")
    low, high = pattern.widths(grid, block)

    @cache  # a pattern may round several widths to the same value
    def density(candidate: SparsePattern) -> float:
        return layer_density(candidate, grid, block, heads)

    if abs(density(pattern) - target) <= CLOSE:
        return pattern, density(pattern)

    def at(width: float) -> SparsePattern:
        return pattern.with_width(float(f"{width:.6g}"), grid, block)

    def saturates(width: float, reached: float) -> bool:
        """Return whether a width past the ends exists and leaves the density unchanged."""
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
        if target > most and saturates(2 * high, most):
            message += _saturation(pattern, f"doubling {pattern.width} again adds")
        if target < least and saturates(low / 2, least):
            message += _saturation(pattern, f"halving {pattern.width} again drops")
        if target < least and grid.text:
            text = 1 - (grid.video / len(grid)) ** 2
            message += f" Text, which is always dense, takes {text:.4f} of it."
        raise ValueError(message)
    best = min(ends, key=lambda candidate: abs(density(candidate) - target))
    halve = False
    while abs(density(best) - target) > CLOSE and high - low > NARROW * high:
        # Alternate between linear interpolation and halving: most of the curves are smooth, but
        # some are stairs.
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
    """Return the pattern nearest to a target density, its density, and whether it meets the target.

    Unlike `with_density` this never raises: where no width meets the target it returns the nearest
    end of the pattern's widths, and a pattern without a width unchanged.
    """
    ends = [pattern]
    if pattern.width is not None:
        try:
            return *with_density(pattern, grid, target, block, heads), True
        except ValueError:
            ends += [pattern.with_width(w, grid, block) for w in pattern.widths(grid, block)]
    found = {end: layer_density(end, grid, block, heads) for end in ends}
    nearest = min(found, key=lambda end: abs(found[end] - target))
    return nearest, found[nearest], False


def _saturation(pattern: SparsePattern, change: str) -> str:
    return (
        f" It saturates: {change} no block; change the other settings of {type(pattern).__name__}."
    )
