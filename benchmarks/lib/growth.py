"""Show how time grows with length: a table, the exponents of fitted power laws, and a plot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

import matplotlib
from matplotlib.figure import Figure

from longreel.data.files import replacing
from longreel.sparse.grid import TokenGrid

NOTES = (
    "The columns from `measured` on are multiples of their first row: forward plus backward, the "
    "blocks that the mask keeps, and two laws in the number of tokens n. The last row holds the "
    "exponents of the power laws in n that fit best (least squares of logarithms)."
)


@dataclass(frozen=True)
class Length:
    """Holds one length and the milliseconds of its forward and backward pass."""

    grid: TokenGrid
    kept_blocks: int
    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the power law a * size**b by least squares of the logarithms, and return b."""
    return linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def curves(lengths: Sequence[Length]) -> dict[str, list[float]]:
    """Return the measured times and candidate growth laws, all 1 at the shortest length."""
    tokens = [len(length.grid) for length in lengths]
    found = {
        "measured": [length.both for length in lengths],
        "kept blocks": [length.kept_blocks for length in lengths],
        "n log n": [n * math.log(n) for n in tokens],
        "n^2": [n**2 for n in tokens],
    }
    return {name: [value / values[0] for value in values] for name, values in found.items()}


def table(lengths: Sequence[Length]) -> str:
    """Return a Markdown table whose last row holds the exponents in the number of tokens."""
    grown = curves(lengths)
    header = ["frames", "tokens", "kept", "forward ms", "backward ms", *grown]
    lines = [f"| {' | '.join(header)} |", len(header) * "|---" + "|"]
    for length, *multiples in zip(lengths, *grown.values(), strict=True):
        cells = [
            str(length.grid.frames),
            f"{len(length.grid):,}",
            f"{length.kept_blocks:,}",
            f"{length.forward:.2f}",
            f"{length.backward:.2f}",
            *(f"{multiple:.2f}" for multiple in multiples),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    tokens = [len(length.grid) for length in lengths]
    fitted = (f"{exponent(tokens, values):.3f}" for values in grown.values())
    lines.append(f"| exponent | | | | | {' | '.join(fitted)} |")
    return "\n".join(lines)


def draw(lengths: Sequence[Length], path: Path) -> None:
    """Draw the curves as SVG, with both axes logarithmic."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    tokens = [len(length.grid) for length in lengths]
    for name, values in curves(lengths).items():
        axes.plot(
            tokens,
            [value * lengths[0].both for value in values],
            "o-" if name == "measured" else "--",
            label=f"{name}: exponent {exponent(tokens, values):.2f}",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward and backward, ms")
    axes.legend()
    with replacing(path) as unfinished, matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(unfinished, format="svg", metadata={"Date": None})
