"""A grid's measurements as a table, with a check of the baselines against their known rates."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

CUDNN = "dense cuDNN"  # prefix of the names of all cuDNN rows
FLEX = "flex"  # prefix of the names of all FlexAttention rows
# Forward and backward TFLOP/s on an H200 at head_dim 128, HunyuanVideo's grids of 64 latent frames.
# A run whose rates differ from these compares our kernels with something else.
ANCHORS = {FLEX: (415.0, 380.0), CUDNN: (604.0, 547.0)}
ANCHORED = ("NVIDIA H200", 128)
ANCHORED_GRIDS = ("hunyuan-3600x64", "hunyuan-3840x64")
MARGIN = 0.05
BACKWARD_FLOPS = 2.5  # relative to the forward pass: five matrix products against two

Triple = tuple[float, float, float]  # forward, backward, both


@dataclass(frozen=True)
class Row:
    """Holds one kernel's measurements on one grid.

    flops: of the forward pass.
    complaint: why it was not timed; empty if it was.
    memory: peak bytes of both passes beyond inputs, output and gradients.
    """

    kernel: str
    flops: float
    complaint: str = ""
    forward: float = math.nan
    backward: float = math.nan
    memory: int = 0

    def timed(self, forward: float, backward: float) -> "Row":
        return replace(self, forward=forward, backward=backward)

    @property
    def milliseconds(self) -> Triple:
        return self.forward, self.backward, self.forward + self.backward

    @property
    def rates(self) -> Triple:
        """Return TFLOP/s of forward, backward and both."""
        forward, backward, both = (self.flops / 1e9 / ms for ms in self.milliseconds)
        return forward, BACKWARD_FLOPS * backward, (1 + BACKWARD_FLOPS) * both


def fastest(rows: Sequence[Row], name: str) -> Row | None:
    """Return the best forward and the best backward among rows whose names begin with `name`.

    None if none of them was timed.
    """
    timed = [row for row in rows if row.kernel.startswith(name) and not row.complaint]
    if not timed:
        return None
    forward = min(row.forward for row in timed)
    backward = min(row.backward for row in timed)
    return Row(name, timed[0].flops, forward=forward, backward=backward)


def table(rows: Sequence[Row], density: float) -> str:
    """Return a Markdown table; `density`, the kept share of blocks, gives the ideal speedup."""
    lines = [
        "| kernel | ms | TFLOP/s | speed over dense cuDNN | of the ideal | over flex | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    cudnn, flex = fastest(rows, CUDNN), fastest(rows, FLEX)
    for row in rows:
        if row.complaint:
            cells = [row.complaint.replace("|", "/"), *5 * [""]]
        else:
            gains = _over(cudnn, row)
            cells = [
                _cell(row.milliseconds, ".2f"),
                _cell(row.rates, ".0f"),
                _cell(gains, ".2f"),
                _cell([gain * density for gain in gains], ".0%"),
                _cell(_over(flex, row), ".2f"),
                f"{row.memory / 2**20:.0f}",
            ]
        lines.append(f"| {' | '.join([row.kernel, *cells])} |")
    return "\n".join(lines)


def _over(base: Row | None, row: Row) -> list[float]:
    """Return how many times faster than `base` the row is; empty without a base."""
    if base is None:
        return []
    return [b / ms for b, ms in zip(base.milliseconds, row.milliseconds, strict=True)]


def _cell(values: Iterable[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values) or "-"


def verdict(grid: str, device: str, head_dim: int, rows: Sequence[Row]) -> str:
    """Say whether flex and cuDNN run at their known rates; empty if the grid has none."""
    if (device, head_dim) != ANCHORED:
        return f"No anchors for {device} at head_dim {head_dim}: flex and cuDNN stand unchecked."
    if grid not in ANCHORED_GRIDS:
        return ""
    found, counts = [], True
    for name, anchor in ANCHORS.items():
        row = fastest(rows, name)
        if row is None:
            found.append(f"{name} was not timed")
            counts = False
            continue
        rates = row.rates[:2]
        for rate, known in zip(rates, anchor, strict=True):
            counts = counts and abs(rate - known) <= MARGIN * known
        found.append(f"{name} runs at {_cell(rates, '.0f')} TFLOP/s ({_cell(anchor, '.0f')} known)")
    return f"{'Counts' if counts else 'Does not count'}: {', '.join(found)}."
