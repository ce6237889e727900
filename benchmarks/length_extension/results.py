"""Hold what cells measured, and how sure it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longreel.data.files import replacing

from .settings import SET_NAMES

DRAWS = 2000  # of the bootstrap
Rows = list[dict[str, float]]


@dataclass
class Result:
    """A cell's figures. sets: by name, the metrics of each clip, None for what cannot be told.

    density: executed share of pairs of a sparse layer. about: cell, device and versions. train: the
    record of its training at the mark.
    """

    density: float
    tokens: int
    about: dict[str, Any]
    train: dict[str, Any]
    sets: dict[str, Rows] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return set(SET_NAMES) <= self.sets.keys()

    def values(self, name: str, metric: str) -> np.ndarray:
        """Return a value for each clip of a set, NaN for what cannot be told."""
        rows = self.sets.get(name, [])
        values = [row.get(metric) for row in rows]
        return np.array([math.nan if v is None else v for v in values], float)


class Store:
    """Results as files, one a cell, written anew with each set that is measured."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "results"

    def load(self, name: str) -> Result | None:
        path = self.folder / f"{name}.json"
        return Result(**json.loads(path.read_text())) if path.is_file() else None

    def save(self, name: str, result: Result) -> None:
        sets = {key: [_plain(row) for row in rows] for key, rows in result.sets.items()}
        plain = vars(result) | {"sets": sets}
        with replacing(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(plain))

    def of_row(self, row: str, factor: int, mark: str = "steps") -> list[Result]:
        """Complete results of a row at a length, by seed."""
        found = {}
        for path in self.folder.glob(f"{row}-{factor}x-seed*.json"):
            result = self.load(path.stem)
            assert result is not None
            cell = result.about["cell"]
            if (cell["row"], cell["mark"]) == (row, mark) and result.complete:
                found[cell["seed"]] = result
        return [found[seed] for seed in sorted(found)]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval. told: share of clips that it could be told of."""

    mean: float
    low: float
    high: float
    told: float = 1.0

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(results: list[Result], name: str, metric: str) -> Interval | None:
    """Return the interval of a metric over seeds and clips: draws seeds, then clips of each.

    With one seed the interval is of clips alone, and says nothing of how training varies. None if
    it can be told of no clip.
    """
    values = [result.values(name, metric) for result in results]
    return bootstrap(values)


def summary(store: Store) -> dict[str, Any]:
    """Every complete cell by name: what it is, and each figure as [mean, low, high, told]."""
    cells = {}
    for path in sorted(store.folder.glob("*.json")):
        result = store.load(path.stem)
        if result is None or not result.complete:
            continue
        figures: dict[str, dict[str, list[float]]] = {}
        for name, rows in result.sets.items():
            found = {metric: interval([result], name, metric) for metric in rows[0]}
            figures[name] = {
                metric: [float(f"{x:.4g}") for x in (i.mean, i.low, i.high, i.told)]
                for metric, i in found.items()
                if i is not None
            }
        about = result.about | {"density": round(result.density, 5), "train": result.train}
        cells[path.stem] = about | {"figures": figures}
    return cells


def difference(
    first: list[Result], second: list[Result], name: str, metric: str
) -> Interval | None:
    """First minus second, clip by clip: those of one seed and number start from the same noise."""
    pairs = [
        a.values(name, metric) - b.values(name, metric)
        for a, b in zip(first, second, strict=False)
        if len(a.values(name, metric)) == len(b.values(name, metric))
    ]
    return bootstrap(pairs)


def _plain(row: dict[str, Any]) -> dict[str, float | None]:
    """Convert for JSON, which has no NaN; a result that goes on has None there already."""
    return {
        key: None if value is None or math.isnan(value) else round(value, 5)
        for key, value in row.items()
    }


def bootstrap(seeds: list[np.ndarray], draws: int = DRAWS) -> Interval | None:
    """95 % percentile interval of the mean of values by seed, NaNs left out."""
    told = [values[np.isfinite(values)] for values in seeds]
    total = sum(len(values) for values in seeds)
    told = [values for values in told if len(values)]
    if not told:
        return None
    random = np.random.default_rng(0)
    chosen = random.integers(len(told), size=(draws, len(told)))
    # Means of resampled clips of each seed, then of the seeds that a draw has chosen.
    means = [v[random.integers(len(v), size=(draws, len(told), len(v)))].mean(-1) for v in told]
    drawn = np.take_along_axis(np.stack(means, 0), chosen[None], 0)[0].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    mean = float(np.mean([values.mean() for values in told]))
    return Interval(mean, float(low), float(high), sum(map(len, told)) / total)
