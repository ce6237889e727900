"""A training step that is tried before the first one and undone: does it fit, what does it take."""

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
from ..optimizer import moments_allocated
from .anatomy import anatomy
from .estimate import GIB, MemoryUse
from .predict import predicted_memory

# Runs backward from the loss of clean latents, noise, noise levels and one caption per sample.
Backward = Callable[[Tensor, Tensor, Tensor, list[Text]], None]


def wants_trial_step(memory: Memory, device: torch.device) -> bool:
    """Return whether a run tries a step first: by `memory.trial_step`, else on GPUs only."""
    return device.type == "cuda" if memory.trial_step is None else memory.trial_step


@dataclass(frozen=True)
class TrialStep:
    """Time and memory of a step that fits, beside the prediction of `longreel plan`.

    allocated, reserved: peak bytes of the GPU, by tensors and by PyTorch's allocator; None on a
    CPU. pinned: bytes of host memory held by `memory.offload`.
    """

    seconds: float
    allocated: float | None
    reserved: float | None
    pinned: float
    predicted: MemoryUse

    def __str__(self) -> str:
        parts = [f"{self.seconds:.1f} s, compilation included"]
        if self.allocated is not None and self.reserved is not None:
            peak, reserve = self.predicted.peak, self.predicted.gpu["reserve"]
            parts += [
                f"{self.allocated / GIB:.1f} GiB of the GPU allocated at the peak (predicted "
                f"{(peak - reserve) / GIB:.1f})",
                f"{self.reserved / GIB:.1f} GiB reserved (predicted {peak / GIB:.1f}, CUDA's "
                "context included)",
            ]
        if self.pinned:
            host = self.predicted.host.get("offload", 0.0)
            parts.append(
                f"{self.pinned / GIB:.1f} GiB of host memory by memory.offload (predicted "
                f"{host / GIB:.1f})"
            )
        return "; ".join(parts)


def run_trial_step(
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
) -> TrialStep:
    """Run forward and backward of the longest batch of the job, and undo their effects.

    text: any caption, for its widths. Raises what `backward` raises when memory runs out.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    accumulating = job.config.train.gradient_accumulation > 1
    with state_restored(attention, parameters, optimizer, device, accumulating=accumulating):
        clean, texts = longest_batch(job, text, dtype)
        clean, generator = clean.to(device), torch.Generator().manual_seed(0)
        noise, sigma = flow.sample(clean, job.config.train.sigma, generator)
        backward(clean, noise, sigma, texts)
        if gpu:
            torch.cuda.synchronize(device)
    return TrialStep(
        seconds=time.perf_counter() - started,
        allocated=torch.cuda.max_memory_allocated(device) if gpu else None,
        reserved=torch.cuda.max_memory_reserved(device) if gpu else None,
        pinned=0 if offload is None else offload.pool.size,
        predicted=predicted_memory(job, anatomy(job)),
    )


def longest_batch(job: Job, text: Text, dtype: torch.dtype) -> tuple[Tensor, list[Text]]:
    """Return zero latents `[B, C, f, h, w]` and the longest captions.

    The first caption has the greatest length and the others one token less, because a batch of
    captions of different lengths takes more memory. text: any caption, for its widths.
    """
    embeds, batch = text["prompt_embeds"], job.config.train.batch
    longest = job.family.text.max_tokens
    lengths = [longest, *[longest - 1] * (batch - 1)]
    texts = [text | {"prompt_embeds": embeds.new_zeros(n, embeds.shape[1])} for n in lengths]
    return torch.zeros(batch, *job.latent_shape(job.frames), dtype=dtype), texts


@contextmanager
def state_restored(
    attention: SparseAttention,
    parameters: Collection[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    accumulating: bool,
) -> Iterator[None]:
    """Wrap forward and backward of a step, and undo their effects.

    Afterwards parameters have no gradients; the optimizer's state, the attention's plan and the
    random generators are as they were before.

    Inside, the device holds what it will hold in the run: the moments, which the first update would
    allocate, and if `accumulating` the gradients of earlier batches. The update itself is not made:
    it needs less memory than the backward, whose activations are free by then.
    """
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            attention.using(attention.current),
            moments_allocated(optimizer, parameters),
        ):
            for parameter in parameters if accumulating else ():
                parameter.grad = torch.zeros_like(parameter)
            yield
    finally:
        for parameter in parameters:
            parameter.grad = None
