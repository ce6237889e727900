"""Measures of a model's attention: how its energy decays with distance, and what masks lose of it.

Energy is the mean post-softmax score between a query and the keys at one distance, in frames at the
same place or in raster positions within the same frame (Radial Attention, arXiv 2506.19852, section
3.1 and Fig. 8b), with the paper's fit y = exp(-a x + b). A mask is judged on the same queries, keys
and values, by the softmax mass that it recalls and by the output's relative mean squared error.

Rows of the attention matrix are computed for sampled queries, some at a time, over all keys: the
figures of those rows are exact, and no tensor is ever tokens x tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import ForwardPlan, SparseAttention
from .grid import TokenGrid
from .layout import BlockLayout, build_layout
from .patterns import SparsePattern

CHUNK_BYTES = 1 << 28  # largest fp32 tensor of scores; about four are alive at a time


@dataclass(frozen=True)
class Decay:
    """Holds a fit y = exp(-a x + b) and the share `r2` of y's variance that it explains.

    All are NaN for fewer than two points.
    """

    a: float
    b: float
    r2: float


def fit_decay(x: Tensor, y: Tensor) -> Decay:
    """Fit y = exp(-a x + b) by least squares on y itself, not on its logarithm.

    For a given a the best exp(b) has a closed form, so only a is searched, on grids that narrow.

    x, y: `[n]`; y is not negative.
    """
    x, y = x.double().cpu(), y.double().cpu()
    if len(x) < 2 or not bool(y.any()):
        return Decay(math.nan, math.nan, math.nan)
    spread = float(x.max() - x.min())
    low, high = -20 / spread, 200 / spread
    for _ in range(8):
        rates = torch.linspace(low, high, 201, dtype=torch.float64)
        # Shifted, so that no exponential overflows; the shift goes back into b.
        exponent = -rates[:, None] * x
        shift = exponent.max(1, keepdim=True).values
        shape = (exponent - shift).exp()
        scale = (shape @ y) / (shape * shape).sum(1)
        error = ((y - scale[:, None] * shape) ** 2).sum(1)
        best = int(error.argmin())
        step = float(rates[1] - rates[0])
        low, high = float(rates[best]) - step, float(rates[best]) + step
    total = ((y - y.mean()) ** 2).sum()
    r2 = float(1 - error[best] / total) if float(total) else math.nan
    b = float(scale[best].log() - shift[best, 0])
    return Decay(float(rates[best]), b, r2)


@dataclass
class Energy:
    """Accumulates scores by distance for each head: `[heads, distances]` fp64 on the CPU."""

    total: Tensor
    count: Tensor

    @classmethod
    def empty(cls, heads: int, distances: int) -> Energy:
        return cls(*(torch.zeros(heads, distances, dtype=torch.float64) for _ in range(2)))

    def add(self, scores: Tensor, distance: Tensor) -> None:
        """Add scores `[heads, rows, keys]` at distances `[rows, keys]`, ignoring distances past the
        last bin."""
        distances, heads = self.total.shape[1], len(scores)
        index = distance.clamp(max=distances).flatten()
        sums = scores.new_zeros(heads, distances + 1, dtype=torch.float64)
        sums.index_add_(1, index, scores.flatten(1).double())
        counts = torch.bincount(index, minlength=distances + 1)[:distances]
        self.total += sums[:, :distances].cpu()
        self.count += counts.cpu()

    def mean(self) -> Tensor:
        """Return the mean score at each distance, `[heads, distances]`; 0 where none was seen."""
        return self.total / self.count.clamp(min=1)

    def fits(self) -> list[Decay]:
        """Fit the decay of each head."""
        seen = self.count[0] > 0
        x = torch.arange(self.total.shape[1])[seen]
        return [fit_decay(x, row[seen]) for row in self.mean()]


@dataclass
class Loss:
    """Accumulates what a mask loses, summed over query rows: `[heads]` fp64 on the CPU.

    recalled: softmax mass on kept keys. error: squared error of the output against dense
    attention's. norm: squared norm of that. rows: query rows added.
    """

    recalled: Tensor
    error: Tensor
    norm: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, heads: int) -> Loss:
        recalled, error, norm = torch.zeros(3, heads, dtype=torch.float64)
        return cls(recalled, error, norm)

    @property
    def recall(self) -> Tensor:
        """The mean share of the softmax mass that is kept, `[heads]`."""
        return self.recalled / max(self.rows, 1)

    @property
    def relative_mse(self) -> Tensor:
        """The output's squared error over dense attention's squared norm, `[heads]`."""
        return self.error / self.norm


@dataclass
class LayerFigures:
    """The figures of one layer, over all observed forwards."""

    temporal: Energy
    spatial: Energy
    masks: dict[str, Loss]


@dataclass(eq=False)
class Observer(SparseAttention):
    """A `SparseAttention` that also measures what it computes; its results are unchanged.

    masks: patterns to judge, by name.
    layers: indices of the layers to measure; None for all.
    rows: queries sampled from the video in each forward; 0 for all.
    positions: number of raster distances that are binned, from 0 up.
    chunk: most bytes of one tensor of scores.
    seed: seed of the sampled queries.
    found: the figures so far, by layer index.
    """

    masks: Mapping[str, SparsePattern] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    rows: int = 256
    positions: int = 41
    chunk: int = CHUNK_BYTES
    seed: int = 0
    found: dict[int, LayerFigures] = field(default_factory=dict)

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.current
        if plan is not None and (self.layers is None or layer_index in self.layers):
            with torch.no_grad():
                self._measure(layer_index, plan, q, k, v)
        return super().attention(layer_index, q, k, v)

    def _measure(
        self, layer_index: int, plan: ForwardPlan, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        grid, heads = plan.grid, q.shape[2]
        if layer_index not in self.found:
            self.found[layer_index] = LayerFigures(
                Energy.empty(heads, grid.frames),
                Energy.empty(heads, min(self.positions, grid.per_frame)),
                {name: Loss.empty(heads) for name in self.masks},
            )
        chosen = self._sample_queries(grid, layer_index)
        lengths = plan.valid or (len(grid),) * len(q)
        size = max(1, self.chunk // (4 * heads * len(grid)))
        for sample, length in enumerate(lengths):
            keys, values = (x[sample, :length].transpose(0, 1).float() for x in (k, v))
            for rows in chosen.split(size):
                rows = rows.to(q.device)
                queries = q[sample, rows].transpose(0, 1).float()
                scores = queries @ keys.mT * q.shape[-1] ** -0.5
                self._add(self.found[layer_index], grid, rows, scores.softmax(-1), values)

    def _sample_queries(self, grid: TokenGrid, layer_index: int) -> Tensor:
        if not self.rows or self.rows >= grid.video:
            return torch.arange(grid.video)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer_index)
        return torch.randperm(grid.video, generator=generator)[: self.rows].sort().values

    def _add(
        self, figures: LayerFigures, grid: TokenGrid, rows: Tensor, scores: Tensor, values: Tensor
    ) -> None:
        """Add post-softmax scores `[heads, rows, keys]` and values `[heads, keys, head_dim]`."""
        s, device = grid.per_frame, rows.device
        frame, place = rows // s, rows % s
        frames, places = torch.arange(grid.frames, device=device), torch.arange(s, device=device)
        for energy, keys, distance in (
            (figures.temporal, frames * s + place[:, None], frames - frame[:, None]),
            (figures.spatial, frame[:, None] * s + places, places - place[:, None]),
        ):
            at = keys.expand(len(scores), -1, -1)
            energy.add(scores.gather(2, at), distance.abs())
        dense = scores @ values
        norm = (dense.double() ** 2).sum((1, 2)).cpu()
        for name, loss in figures.masks.items():
            kept = self._kept(self.masks[name], grid, rows, scores.shape)
            masked = scores * kept
            mass = masked.sum(-1)
            out = masked @ values / mass[..., None].clamp(min=torch.finfo(mass.dtype).tiny)
            loss.recalled += mass.double().sum(1).cpu()
            loss.error += ((out - dense).double() ** 2).sum((1, 2)).cpu()
            loss.norm += norm
            loss.rows += len(rows)

    def _kept(
        self, pattern: SparsePattern, grid: TokenGrid, rows: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """Return which pairs a mask computes, bool in the scores' shape `[heads, rows, keys]`."""
        layout = build_layout(pattern, grid, self.block)
        layout_of_head = pattern.head_layouts(shape[0])
        used = sorted(set(layout_of_head))
        per_layout = torch.stack([kept_keys(layout, index, rows, shape[2]) for index in used])
        return per_layout[[used.index(index) for index in layout_of_head]]


def kept_keys(layout: BlockLayout, index: int, rows: Tensor, tokens: int) -> Tensor:
    """Return which pairs of the queries `rows` and the first `tokens` tokens a layout computes:
    bool `[len(rows), tokens]` on the device of `rows`."""
    place = torch.arange(layout.rows * layout.block)
    if layout.inverse is not None:
        place = layout.inverse[index].cpu().long()
    blocks = (place // layout.block).to(rows.device)
    starts = layout.row_indptr[index].tolist()
    kept = torch.zeros(len(rows), layout.rows, dtype=torch.bool)
    for line, block in zip(kept, blocks[rows].tolist(), strict=True):
        line[layout.row_indices[starts[block] : starts[block + 1]].long()] = True
    return kept.to(rows.device)[:, blocks[:tokens]]


def summary(observer: Observer, densities: Mapping[str, float]) -> dict[str, Any]:
    """Return all figures as plain numbers, for JSON: for each layer the fits of every head and what
    each mask keeps, then the figures over all layers."""
    layers = {}
    for index, found in sorted(observer.found.items()):
        layers[str(index)] = {
            "temporal": _decays(found.temporal),
            "spatial": _decays(found.spatial),
            "masks": {
                name: {
                    "relative_mse": loss.relative_mse.tolist(),
                    "recall": loss.recall.tolist(),
                }
                for name, loss in found.masks.items()
            },
        }
    return {
        "layers": layers,
        "decay": {kind: _r2(layers, kind) for kind in ("temporal", "spatial")},
        "masks": {name: _overall(layers, name, densities[name]) for name in observer.masks},
    }


def _decays(energy: Energy) -> dict[str, Any]:
    fits = energy.fits()
    return {
        "energy": energy.mean().tolist(),
        **{name: [getattr(fit, name) for fit in fits] for name in ("a", "b", "r2")},
    }


def _r2(layers: Mapping[str, Any], kind: str) -> dict[str, float]:
    values = torch.tensor([r2 for layer in layers.values() for r2 in layer[kind]["r2"]])
    values = values[values.isfinite()]
    if not len(values):
        return {"heads": 0, "median_r2": math.nan, "above_0.985": math.nan}
    return {
        "heads": len(values),
        "median_r2": float(values.median()),
        "above_0.985": float((values > 0.985).float().mean()),
    }


def _overall(layers: Mapping[str, Any], name: str, density: float) -> dict[str, float]:
    """Return one mask's density, and its figures averaged over layers and heads."""
    figures = {"density": density}
    for key in ("relative_mse", "recall"):
        values = [value for layer in layers.values() for value in layer["masks"][name][key]]
        figures[key] = sum(values) / len(values) if values else math.nan
    return figures
