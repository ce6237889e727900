"""Measure how attention decays in the experiment's trained models, and what masks keep of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longreel.data.files import replacing
from longreel.data.synthetic import ClipSet
from longreel.sparse.analyze import Observer, summary
from longreel.sparse.patterns import PATTERNS, Dense
from longreel.trainer.flow import add_noise
from longreel.trainer.sampling.pipeline import evaluating

from .cells import Cell, pattern_of, solved
from .pixels import Bf16Attention, PixelWan, to_latents
from .settings import SET_NAMES
from .training import half_products

SEEN = 4  # seed of the observed clips, one of each set
SIGMAS = (0.3, 0.6, 0.9)
ROWS = 512  # queries of a layer and clip
ANALYSED = ("base-1x-seed0", "dense-4x-seed0")


class Bf16Observer(Observer, Bf16Attention):
    """Observes what `Bf16Attention` computes."""


def analyse(cell: Cell, model: Any, family: PixelWan, path: Path, device: torch.device) -> None:
    """Write the figures of a densely attending model, with every pattern at radial's density."""
    if path.is_file():
        return
    scale = family.scale
    rows = [row for row in PATTERNS if row != "dense"]
    masks = {row: solved(Cell(row, cell.factor, pattern=pattern_of(row)), scale) for row in rows}
    observer = Bf16Observer(
        Dense(), block=scale.block, masks={row: mask for row, (mask, _) in masks.items()}, rows=ROWS
    )
    family.install(model, observer)
    source = ClipSet("mix", scale.arena(cell.factor), SEEN)
    with torch.no_grad(), evaluating(model), half_products(device, model.dtype == torch.float32):
        for index in range(len(SET_NAMES)):
            pixels = torch.from_numpy(source.clip(index))[None].to(device)
            clean = to_latents(pixels, scale.squeeze)
            text = family.text.collate([family.encode_caption(source.caption(index))])
            text = {name: x.to(device) for name, x in text.items()}
            for level, sigma in enumerate(SIGMAS):
                generator = torch.Generator().manual_seed(index * 101 + level)
                noise = torch.randn(clean.shape, generator=generator).to(device)
                sigmas = torch.full((1,), sigma, device=device)
                family.noising.predict(model, add_noise(clean, noise, sigmas), sigmas, text)
    figures = summary(observer, {row: density for row, (_, density) in masks.items()})
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures), encoding="utf-8")


def section(folder: Path) -> str:
    """Return Markdown tables of the figures found in `folder`; empty without any."""
    parts = []
    for name in ANALYSED:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        figures = json.loads(path.read_text(encoding="utf-8"))
        decays = [
            f"{kind}: median R^2 {found['median_r2']:.3f}, above 0.985 in "
            f"{found['above_0.985']:.0%} of {found['heads']} heads"
            for kind, found in figures["decay"].items()
        ]
        lines = ["| mask | density | recalled mass | relative MSE |", "|---|---|---|---|"]
        masks = sorted(figures["masks"].items(), key=lambda item: item[1]["relative_mse"])
        for row, mask in masks:
            cells = f"{mask['density']:.1%} | {mask['recall']:.1%} | {mask['relative_mse']:.2e}"
            lines.append(f"| `{row}` | {cells} |")
        table = "\n".join(lines)
        parts.append(f"`{name}`: energy as exp(-ax + b), {'; '.join(decays)}.\n\n{table}")
    return "\n\n".join(parts)
