"""Results of cells, with bootstrap intervals."""

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
    """Holds a cell's figures. sets: each clip's metrics by set, None where undefined.

    density: share of pairs that a sparse layer computes. about: cell, device and versions.
    train: the record of its training at the mark.
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
        """Return a metric of each clip of a set, NaN where it is undefined."""
        rows = self.sets.get(name, [])
        values = [row.get(metric) for row in rows]
        return np.array([math.nan if v is None else v for v in values], float)


class Store:
    """Keeps one result file per cell, rewritten after each measured set."""

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
        """Return the complete results of a row at a length, in order of seeds."""
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
    """Holds a mean and its 95 % bootstrap interval. told: share of clips where it is defined."""

    mean: float
    low: float
    high: float
    told: float = 1.0

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(results: list[Result], name: str, metric: str) -> Interval | None:
    """Return the bootstrap interval of a metric over a set: draw seeds, then clips of each.

    With one seed the interval covers clips alone, and says nothing about how training varies. None
    if the metric is undefined for every clip.
    """
    values = [result.values(name, metric) for result in results]
    return bootstrap(values)


def summary(store: Store) -> dict[str, Any]:
    """Return every complete cell by name, with each figure as [mean, low, high, told]."""
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
    """Return the interval of first minus second, paired by clip.

    Clips of the same seed and number start from the same noise.
    """
    pairs = [
        a.values(name, metric) - b.values(name, metric)
        for a, b in zip(first, second, strict=False)
        if len(a.values(name, metric)) == len(b.values(name, metric))
    ]
    return bootstrap(pairs)


def _plain(row: dict[str, Any]) -> dict[str, float | None]:
    """Replace NaN, which JSON lacks, by None; a resumed result holds None already."""
    return {
        key: None if value is None or math.isnan(value) else round(value, 5)
        for key, value in row.items()
    }


def bootstrap(seeds: list[np.ndarray], draws: int = DRAWS) -> Interval | None:
    """Return the 95 % percentile interval of the mean of values by seed, ignoring NaNs."""
    told = [values[np.isfinite(values)] for values in seeds]
    total = sum(len(values) for values in seeds)
    told = [values for values in told if len(values)]
    if not told:
        return None
    random = np.random.default_rng(0)
    chosen = random.integers(len(told), size=(draws, len(told)))
    # Average resampled clips within each seed, then over the seeds of each draw.
    means = [v[random.integers(len(v), size=(draws, len(told), len(v)))].mean(-1) for v in told]
    drawn = np.take_along_axis(np.stack(means, 0), chosen[None], 0)[0].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    mean = float(np.mean([values.mean() for values in told]))
    return Interval(mean, float(low), float(high), sum(map(len, told)) / total)
