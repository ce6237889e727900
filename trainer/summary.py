"""The summary of a finished run: its loss curves and a short table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from ..data.files import replacing
from .job import Job
from .run.metrics import AttentionCost, column

Rows = Sequence[Mapping[str, str]]  # of metrics.csv


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def density_by_layer(densities: Sequence[float]) -> str:
    """Return densities as `23.2% of all pairs over 40 layers: 100.0% in 0-1, 19.1% in 2-39`."""
    runs = []
    for share, run in groupby(enumerate(densities), key=lambda pair: pair[1]):
        indices = [index for index, _ in run]
        runs.append(
            f"{share:.1%} in {'-'.join(map(str, dict.fromkeys((indices[0], indices[-1]))))}"
        )
    mean = sum(densities) / len(densities)
    return f"{mean:.1%} of all pairs over {len(densities)} layers: {', '.join(runs)}"


def solved_density(job: Job, achieved: float) -> str:
    """Return a sparse layer's width as `decay=0.981 (wanted 0.19, achieved 0.1899)`."""
    wanted, width = job.config.sparse.density, job.pattern.width
    assert wanted is not None and width is not None
    found = getattr(job.pattern, width)
    return f"{width}={found} (wanted {wanted:.4g}, achieved {achieved:.4f})"


def draw_losses(rows: Rows) -> Figure:
    """Plot training and held-out losses over steps."""
    figure = Figure(figsize=(7, 4), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    loss = column(rows, "loss")
    axes.plot(list(loss), list(loss.values()), color="0.7", linewidth=0.8, label="training")
    for name in ("target", "native"):
        heldout = column(rows, f"heldout_loss_{name}")
        axes.plot(
            list(heldout), list(heldout.values()), marker="o", label=f"held out, {name} length"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("flow-matching loss")
    axes.legend()
    figure.tight_layout()
    return figure


def summary(
    job: Job, cost: AttentionCost, speedup: str, rows: Rows, files: Sequence[Path]
) -> Table:
    """Tabulate density, saved work, losses from start to end, pace, and the files of a run."""
    table = Table(title=escape(str(job.config.run_dir)), show_header=False)
    table.add_row(
        "length",
        f"{job.native_frames} -> {job.frames} frames, {len(job.grid(job.frames)):,} tokens",
    )
    table.add_row("attention pattern", escape(str(job.pattern)))
    table.add_row(
        "attention density",
        f"{cost.density:.1%} of all pairs, over all layers; sparse ones {cost.layer_density:.1%}",
    )
    of = f"{cost.dense_pflop - cost.pflop:.3g} of {cost.dense_pflop:.3g} PFLOP a forward"
    table.add_row("attention FLOPs saved", f"{cost.sparsity:.1%} ({of})")
    table.add_row("attention speedup, sparse layer", speedup)
    for name in ("target", "native"):
        losses = list(column(rows, f"heldout_loss_{name}").values())
        if losses:
            change = losses[-1] / losses[0] - 1
            text = f"{losses[0]:.4f} -> {losses[-1]:.4f} ({change:+.1%})"
            table.add_row(f"held-out loss, {name} length", text)
    seconds = column(rows, "seconds_per_step").values()
    memory = column(rows, "peak_memory_gib").values()
    if seconds:
        table.add_row("seconds a step (median)", f"{statistics.median(seconds):.2f}")
        table.add_row("peak memory of a step", f"{max(memory):.1f} GiB")
    for file in files:
        table.add_row("file", escape(str(file)))
    return table
