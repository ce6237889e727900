"""The cells to compare: a cell is one model, tuned in one way at one length, and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache
from typing import Any, Literal

from longreel.sparse.density import layer_density, nearest_density
from longreel.sparse.patterns import (
    PATTERNS,
    Cube,
    Dense,
    Radial,
    SlidingTile,
    SparsePattern,
    Spatial,
)
from longreel.trainer.config.recipe import pattern_to_dict
from longreel.trainer.config.schema import RopeName
from longreel.trainer.config.values import ConfigError

from .settings import Scale

MAIN = ("radial", "dense", "spatial", "none")
# Replaces the defaults that a pattern has for larger frames than the experiment's.
PARAMETERS: dict[str, SparsePattern] = {
    "sliding_tile": SlidingTile(tile="4x4x4"),
    "cube": Cube(near=3),
}
WIDER = (8, 20)  # frames on either side that radial sees whole; a window is set to its density


@dataclass(frozen=True)
class Cell:
    """Holds one comparison.

    row: its name in tables. factor: length in native lengths. seed: of everything random.

    method: `none` samples the base as it is, `lora` and `full` train that much of it.
    near: the pattern is solved for the density that Radial(near) has; None leaves it as given.
    dense_layers: first layers that stay dense. mark: measured after so many `steps`, or once it has
        trained for the GPU `seconds` that radial's steps took.
    other_captions: sampled with the other caption of each set.
    """

    row: str
    factor: int
    seed: int = 0
    method: Literal["none", "lora", "full"] = "lora"
    pattern: SparsePattern = Dense()
    near: int | None = 1
    dense_layers: int = 0
    rope: RopeName = "native"
    mark: Literal["steps", "seconds"] = "steps"
    other_captions: bool = False

    @property
    def name(self) -> str:
        """Return the name of its files, unique among cells."""
        parts = [self.row, f"{self.factor}x", f"seed{self.seed}"]
        return "-".join(parts + ["seconds"] * (self.mark == "seconds"))

    @property
    def run(self) -> str:
        """Return the name of the training run that passes through this cell's mark."""
        return replace(self, mark="steps").name

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"pattern": pattern_to_dict(self.pattern)}


@cache
def solved(cell: Cell, scale: Scale) -> tuple[SparsePattern, float]:
    """Return the pattern at the width nearest to radial's density, and its density."""
    pattern, grid = cell.pattern, scale.grid(cell.factor)
    given = (grid, scale.block, scale.heads)
    if isinstance(pattern, Dense) or pattern.width is None or cell.near is None:
        return pattern, layer_density(pattern, *given)
    target = layer_density(Radial(near=cell.near), *given)
    return nearest_density(pattern, grid, target, scale.block, scale.heads)[:2]


def pattern_of(row: str) -> SparsePattern:
    return PARAMETERS.get(row) or PATTERNS[row]()


def control_cells() -> Iterator[Cell]:
    """Yield the base and the controls that must hold before any row is trusted."""
    yield Cell("base", 1, method="none")
    yield Cell("base-other-captions", 1, method="none", other_captions=True)
    for factor in (4, 2):
        yield Cell("none", factor, method="none")
    # Layers times the window's reach is less than the gap of `occlude`, so it must be at chance.
    yield Cell("window-of-1", 4, pattern=Spatial(half_width=1, sink=False), near=None)


def main_cells(seed: int) -> Iterator[Cell]:
    """Yield the rows that are repeated with every seed.

    `none` trains nothing, so a seed changes only its samples.
    """
    for factor in (4, 2):
        for row in MAIN[:3]:
            cell = Cell(row, factor, seed, pattern=pattern_of(row))
            yield cell
            if row != "radial":
                yield replace(cell, mark="seconds")
        if seed:
            yield Cell("none", factor, seed, method="none")


def pattern_cells() -> Iterator[Cell]:
    """Yield one seed of every pattern there is, at radial's density."""
    for factor in (4, 2):
        for row in PATTERNS:
            if row not in MAIN:
                yield Cell(row, factor, pattern=pattern_of(row))


def question_cells() -> Iterator[Cell]:
    """Yield cells for the other choices of recipes: all weights, RoPE, dense layers, density."""
    for factor in (4, 2):
        for row in ("radial", "dense"):
            yield Cell(f"{row}-full", factor, method="full", pattern=pattern_of(row))
        for rope in ("riflex", "interpolate"):
            yield Cell(f"radial-{rope}", factor, pattern=Radial(), rope=rope)
    for row in ("radial", "spatial"):
        yield Cell(f"{row}-1-dense-layer", 4, pattern=pattern_of(row), dense_layers=1)
    # Radial's windows are one block wide at this size, so only whole frames can widen it.
    for near in WIDER:
        yield Cell(f"radial-near-{near}", 4, pattern=Radial(near=near), near=None)
        yield Cell(f"spatial-as-near-{near}", 4, pattern=Spatial(), near=near)
    yield Cell("radial-no-sink", 4, pattern=Radial(sink=False), near=None)


def plan(seeds: list[int], only: str = "*") -> list[Cell]:
    """Return the cells in the order they run: those that others depend on come first.

    only: names or rows with `*`, separated by commas. Raises ConfigError where none fits.
    """
    first, *others = seeds
    cells = [*control_cells(), *main_cells(first)]
    for seed in others:
        cells += main_cells(seed)
    cells += [*pattern_cells(), *question_cells()]
    wanted = [text.strip() for text in only.split(",")]
    chosen = [c for c in cells if any(fnmatch(c.name, w) or fnmatch(c.row, w) for w in wanted)]
    if not chosen:
        rows = ", ".join(dict.fromkeys(cell.row for cell in cells))
        raise ConfigError(f"only={only} matches no cell. Rows: {rows}.")
    return chosen
