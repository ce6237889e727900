"""A training step before the first, thrown away: whether a run's steps fit, and what they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...sparse.attention import SparseAttention
from .. import flow
from ..config.schema import Memory
from ..families.text import Text
from ..job import Job
from ..memory.offload import Offload
from ..memory.optimizer import moments_held
from .anatomy import anatomy
from .estimate import GIB, MemoryUse
from .predict import predicted_memory

# The backward of a loss, of clean latents, noise, noise levels and a caption for each.
Backward = Callable[[Tensor, Tensor, Tensor, list[Text]], None]


def is_probed(memory: Memory, device: torch.device) -> bool:
    """Whether a run tries a step first: as set, else on a GPU, where a step is what runs out."""
    return device.type == "cuda" if memory.trial_step is None else memory.trial_step


@dataclass(frozen=True)
class Taken:
    """By a step that fits, in seconds and bytes, beside what `plan` predicted.

    allocated, reserved: of the GPU at most, by tensors and by PyTorch's allocator; None on a CPU.
    pinned: of host memory, by `memory.offload`.
    """

    seconds: float
    allocated: float | None
    reserved: float | None
    pinned: float
    predicted: MemoryUse

    def __str__(self) -> str:
        parts = [f"{self.seconds:.1f} s, with what a first one compiles"]
        if self.allocated is not None and self.reserved is not None:
            peak, reserve = self.predicted.peak, self.predicted.gpu["reserve"]
            parts += [
                f"{self.allocated / GIB:.1f} GiB of the GPU allocated at most (predicted "
                f"{(peak - reserve) / GIB:.1f})",
                f"{self.reserved / GIB:.1f} GiB reserved (predicted {peak / GIB:.1f}, with CUDA's "
                "own)",
            ]
        if self.pinned:
            host = self.predicted.host.get("offload", 0.0)
            parts.append(
                f"{self.pinned / GIB:.1f} GiB of host memory by memory.offload (predicted "
                f"{host / GIB:.1f})"
            )
        return "; ".join(parts)


def try_step(
    job: Job,
    backward: Backward,
    *,
    attention: SparseAttention,
    parameters: Collection[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    offload: Offload | None,
    text: Text,
    device: torch.device,
    dtype: torch.dtype,
) -> Taken:
    """Forward and backward of the longest batch that the job meets, as if they had never been.

    text: of any caption, for its widths. Raises what `backward` does when memory runs out.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    accumulating = job.config.train.gradient_accumulation > 1
    with thrown_away(attention, parameters, optimizer, device, accumulating=accumulating):
        clean, texts = longest_batch(job, text, dtype)
        clean, generator = clean.to(device), torch.Generator().manual_seed(0)
        noise, sigma = flow.sample(clean, job.config.train.sigma, generator)
        backward(clean, noise, sigma, texts)
        if gpu:
            torch.cuda.synchronize(device)
    return Taken(
        seconds=time.perf_counter() - started,
        allocated=torch.cuda.max_memory_allocated(device) if gpu else None,
        reserved=torch.cuda.max_memory_reserved(device) if gpu else None,
        pinned=0 if offload is None else offload.arena.size,
        predicted=predicted_memory(job, anatomy(job)),
    )


def longest_batch(job: Job, text: Text, dtype: torch.dtype) -> tuple[Tensor, list[Text]]:
    """Latents `[B, C, f, h, w]`, zeros, and captions of the greatest length and of one token less,
    for lengths that differ within a batch take more. All clips of a run have one shape.

    text: of any caption, for its widths.
    """
    embeds, batch = text["prompt_embeds"], job.config.train.batch
    longest = job.family.text.max_tokens
    lengths = [longest, *[longest - 1] * (batch - 1)]
    texts = [text | {"prompt_embeds": embeds.new_zeros(n, embeds.shape[1])} for n in lengths]
    return torch.zeros(batch, *job.latent_shape(job.frames), dtype=dtype), texts


@contextmanager
def thrown_away(
    attention: SparseAttention,
    parameters: Collection[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    accumulating: bool,
) -> Iterator[None]:
    """Around the forward and backward of a step: afterwards parameters have no gradients, and the
    optimizer's state, the attention's plan and the random numbers to come are as they were.

    Within it the device holds what it will in the run: the moments, which the first update would
    allocate, and when `accumulating` the gradients of the batches before. The update itself is not
    made; it needs less than the backward, whose activations are gone by then.
    """
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            attention.using(attention.current),
            moments_held(optimizer, parameters),
        ):
            for parameter in parameters if accumulating else ():
                parameter.grad = torch.zeros_like(parameter)
            yield
    finally:
        for parameter in parameters:
            parameter.grad = None
