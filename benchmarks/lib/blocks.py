"""Models of few blocks at full width, and what they say of the published depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from longreel.trainer.families.base import ModelFamily
from longreel.trainer.families.published import blank_transformer
from longreel.trainer.job import Job

# Blocks by kind, in the order they run: `single sparse` is a block of one stream whose
# self-attention is sparse.
Counts = dict[str, int]

STREAMS = {"single_transformer_blocks": "single", "transformer_blocks": "dual", "blocks": "block"}
DEPTHS = {"single_transformer_blocks": "num_single_layers"}  # in diffusers' configs; else:
DEPTH = "num_layers"


@dataclass(frozen=True)
class Design:
    """Says which models are measured.

    One has `low` blocks of each kind, and for each kind in turn another has `high` of it. With
    low = high = 0 only the whole model is measured, and nothing is extrapolated.

    Anything linear in the numbers of blocks, such as time and memory, is exact at any depth: the
    first and last layers (and Mochi's special last block) are in every model once.
    """

    whole: Counts
    low: int
    high: int

    @property
    def points(self) -> list[Counts]:
        if not self.high:
            return [self.whole]
        base = dict.fromkeys(self.whole, self.low)
        return [base, *(base | {kind: self.high} for kind in self.whole)]

    def per_block(self, values: Sequence[float]) -> dict[str, float]:
        """Return what one more block of each kind adds to `values`; empty for a whole model."""
        base, *more = values
        more = dict(zip(self.whole, more, strict=True)) if self.high else {}
        return {kind: (value - base) / (self.high - self.low) for kind, value in more.items()}

    def total(self, values: Sequence[float]) -> float:
        """Extrapolate the points' values to the whole model."""
        rest = {kind: count - self.low for kind, count in self.whole.items()}
        each = self.per_block(values)
        return values[0] + sum(rest[kind] * value for kind, value in each.items())


def count_blocks(job: Job) -> Counts:
    """Count the blocks of the job's model at its own depth."""
    model = blank_transformer(job.family, job.model_path, job.config.model.revision)
    attention, counts, layer = job.attention(), {}, 0
    for stack, blocks in _stacks(model).items():
        for _ in blocks:
            kind = f"{STREAMS[stack]} {'dense' if attention.is_dense(layer) else 'sparse'}"
            counts[kind] = counts.get(kind, 0) + 1
            layer += 1
    return counts


def with_blocks(job: Job, counts: Counts) -> Job:
    """Return the job for a model with `counts` blocks; the dense ones of a stack come first."""
    revision = job.config.model.revision
    stacks = _stacks(blank_transformer(job.family, job.model_path, revision))
    kinds = [kind.split() for kind, count in counts.items() for _ in range(count)]
    kinds.sort(key=lambda kind: ([STREAMS[s] for s in stacks].index(kind[0]), kind[1]))
    depths = {stream: len(list(group)) for stream, group in groupby(kinds, lambda kind: kind[0])}
    settings = {DEPTHS.get(s, DEPTH): depths.get(STREAMS[s], 0) for s in stacks}
    sparse = replace(
        job.config.sparse,
        pattern=job.pattern,
        density=None,  # the solved pattern already meets it
        dense_layers=[i for i, (_, attention) in enumerate(kinds) if attention == "dense"],
    )
    return replace(
        job,
        config=replace(job.config, sparse=sparse),
        family=_shallow(job.family, job.model_path, settings),
        geometry=replace(job.geometry, layers=len(kinds)),
        model_path=f"{job.model_path} with {describe(counts)}",  # matches no published model
    )


def describe(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _stacks(model: Any) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks by name, in the order they run."""
    return {n: m for n, m in model.named_children() if isinstance(m, nn.ModuleList)}


def _shallow(family: ModelFamily, path: str, settings: Mapping[str, int]) -> ModelFamily:
    """Return a family that always loads the model at `path`, at the depth in `settings`."""

    class Shallow(type(family.loader)):
        def blank_transformer(self, _: str, revision: str | None) -> Any:
            blank: Any = blank_transformer(family, path, revision)
            with torch.device("meta"):
                return type(blank).from_config(blank.config, **settings)

    return replace(family, loader=Shallow(**vars(family.loader)))
