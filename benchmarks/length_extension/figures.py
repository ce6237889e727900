"""Curves and strips of samples for the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

from longreel.data.coherence import lags
from longreel.data.files import replacing

from .cells import MAIN
from .results import Store, interval
from .settings import SET_NAMES, Scale

TASKS = ("bounce", "occlude", "cross")


def draw(store: Store, scale: Scale, strips: Path, folder: Path) -> list[Path]:
    """Draw the figures for which there are results, and return their paths."""
    made = []
    for name, figure in (
        ("agreement-by-lag.svg", agreement_by_lag(store, scale)),
        ("quality-by-density.svg", quality(store, "density")),
        ("quality-by-seconds.svg", quality(store, "seconds")),
        ("samples-4x.png", samples(strips, scale)),
    ):
        if figure is None:
            continue
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, format=name[-3:], bbox_inches="tight", dpi=130)
        made.append(folder / name)
    return made


def agreement_by_lag(store: Store, scale: Scale) -> Figure | None:
    """Plot colour agreement against the frames between two sightings, at four times the length."""
    rows = {row: found for row in MAIN if (found := store.of_row(row, 4))}
    if not rows:
        return None
    figure = Figure(figsize=(11, 3.2))
    for axis, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        for row, found in rows.items():
            points = []
            for lag in lags(scale.frames(4), scale.native):
                value = interval(found, task, f"agree@{lag}")
                if value is not None:
                    points.append((lag, value.mean, value.low, value.high))
            if points:
                x, mean, low, high = np.array(points).T
                axis.plot(x, mean, marker="o", ms=3, label=row)
                axis.fill_between(x, low, high, alpha=0.15)
        axis.axhline(1 / 6, color="grey", lw=0.8, ls=":")
        axis.set_title(task)
        axis.set_xlabel("frames between")
    figure.axes[0].set_ylabel("same colour (dotted: chance)")
    if figure.axes[0].has_data() and figure.axes[0].get_legend_handles_labels()[1]:
        figure.axes[0].legend()
    return figure


def quality(store: Store, against: str) -> Figure | None:
    """Plot the same colour at both ends against cost, for every cell at four times the length."""
    names = sorted(path.stem for path in store.folder.glob("*-4x-seed*.json"))
    loaded = [result for name in names if (result := store.load(name)) and result.complete]
    if not loaded:
        return None
    figure = Figure(figsize=(8, 3.4))
    for axis, task in zip(figure.subplots(1, 2, sharey=True), ("occlude", "cross"), strict=True):
        for result in loaded:
            cell, value = result.about["cell"], interval([result], task, "ends")
            x = result.density if against == "density" else result.train["seconds"]
            if value is None or (cell["method"] == "none" and against == "seconds"):
                continue
            error = [[value.mean - value.low], [value.high - value.mean]]
            axis.errorbar(x, value.mean, error, fmt="o", ms=3, lw=0.8, color="tab:blue")
            axis.annotate(
                cell["row"], (x, value.mean), fontsize=5, xytext=(3, 2), textcoords="offset points"
            )
        axis.axhline(1 / 6, color="grey", lw=0.8, ls=":")
        axis.set_title(task)
        axis.set_xlabel("density of a sparse layer" if against == "density" else "GPU seconds")
    figure.axes[0].set_ylabel("same colour at both ends")
    return figure


def samples(strips: Path, scale: Scale) -> Figure | None:
    """Show the first clips of each set as each main row draws them at four times the length."""
    rows = [row for row in MAIN if (strips / f"{row}-4x-seed0-{SET_NAMES[0]}.png").is_file()]
    if not rows:
        return None
    figure = Figure(figsize=(4.2 * len(rows), 1.1 * len(SET_NAMES)))
    axes = figure.subplots(len(SET_NAMES), len(rows), squeeze=False)
    for line, task in zip(axes, SET_NAMES, strict=True):
        for axis, row in zip(line, rows, strict=True):
            axis.imshow(imread(strips / f"{row}-4x-seed0-{task}.png"))
            axis.set_xticks([])
            axis.set_yticks([])
            if task == SET_NAMES[0]:
                axis.set_title(row)
        line[0].set_ylabel(task)
    return figure
