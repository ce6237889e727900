"""Check that a sparse step whose pattern keeps all blocks computes what the dense step does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import SparsePattern
from longreel.trainer.job import Job
from longreel.trainer.memory.device import fastest_dense

from .blocks import count_blocks, with_blocks
from .rows import Caption, Stepper

OTHER = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # another dense kernel: sets the budget
# The sparse step may be this many times as far from the dense one as two dense kernels are from
# each other: it splits its products differently, and its memory settings may round elsewhere.
ROOM = 4
BLOCKS = 2  # of each kind
SIDE = 16  # tokens, of a frame
STEPS = 2  # of the VAE in time: three latent frames, where each is one
Kernels = AbstractContextManager[object]  # selects the kernels of dense attention


@dataclass(frozen=True)
class AllBlocks(SparsePattern):
    """Keeps everything, and unlike `Dense` goes through the block-sparse kernel."""

    def keep(
        self, grid: TokenGrid, q: Tensor, kv: Tensor, block: int = 128, layout: int = 0
    ) -> Tensor:
        return torch.ones(torch.broadcast_shapes(q.shape, kv.shape), dtype=torch.bool)

    def blocks(self, grid: TokenGrid, block: int) -> Tensor:
        return torch.ones(2 * [-(-grid.video // block)], dtype=torch.bool)


class Result(NamedTuple):
    """Holds the model's output and the adapter's gradients by name after forward and backward."""

    output: Tensor
    gradients: dict[str, Tensor]


def check(dense: Job, radial: Job, device: torch.device) -> str:
    """Compare a step of two jobs of one model on a small grid, the second's pattern keeping all.

    Relative Frobenius norms; the budget is what another dense kernel makes of them. Returns the
    comparison in words.

    Raises:
        SystemExit: if they are further apart than that.
    """
    shared: dict[str, nn.Parameter] = {}
    sparse = replace(radial.config.sparse, pattern=AllBlocks(), density=None, dense_layers=0)
    radial = _small(replace(radial, config=replace(radial.config, sparse=sparse)))
    dense = _small(dense)
    expected = _run(dense, shared, device, fastest_dense())
    other_kernel = _run(dense, shared, device, sdpa_kernel([*OTHER], set_priority=True))
    *noise, _ = apart(expected, other_kernel)
    *errors, name = apart(expected, _run(radial, shared, device, fastest_dense()))
    eps = torch.finfo(expected.output.dtype).eps
    parts = [
        f"{what} {error:.1e} ({other:.1e})"
        for what, error, other in zip(("output", "gradient"), errors, noise, strict=True)
    ]
    told = (
        f"{len(radial.grid(radial.frames)):,} tokens, all blocks kept, against the dense row, "
        f"relative: {', '.join(parts)}; in brackets another dense kernel against it. The gradient "
        f"is the furthest, {name}"
    )
    if any(error > ROOM * max(other, eps) for error, other in zip(errors, noise, strict=True)):
        raise SystemExit(f"error: the sparse step is wrong, nothing is timed. {told}")
    return f"Before timing: {told}."


def apart(expected: Result, found: Result) -> tuple[float, float, str]:
    """Return the relative distance of the outputs, the largest of the gradients, and its name."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).norm() / a.float().norm())

    gradients: Mapping[str, Tensor] = found.gradients
    assert gradients.keys() == expected.gradients.keys()
    furthest, name = max(
        (relative(grad, gradients[name]), name) for name, grad in expected.gradients.items()
    )
    return relative(expected.output, found.output), furthest, name


def _small(job: Job) -> Job:
    """Reduce the job to few blocks of its model and a short video of small frames."""
    job = with_blocks(job, dict.fromkeys(count_blocks(job), BLOCKS))
    geometry, side = job.geometry, SIDE * job.geometry.spatial * job.geometry.patch[1]
    frames = STEPS * geometry.frame_step + 1
    extend = replace(job.config.extend, native=frames, factor=None)
    config = replace(job.config, frames=frames, height=side, width=side, extend=extend)
    return replace(job, config=config)


def _run(
    job: Job, shared: dict[str, nn.Parameter], device: torch.device, kernels: Kernels
) -> Result:
    stepper = Stepper(job, shared, device, Caption())
    outputs: list[Tensor] = []
    stepper.learner.transformer.register_forward_hook(
        lambda *call: outputs.append(call[-1][0].detach())
    )
    gradients = stepper.gradients(kernels)
    return Result(outputs[0], gradients)
