"""What PyTorch is told of a GPU, where what it does by itself is not the best for long clips."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# The fastest dense attention that torch ships comes first, whatever it would pick.
DENSE_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def fastest_dense() -> AbstractContextManager[object]:
    """Under it SDPA takes the first of DENSE_BACKENDS that can, in all threads, and plain products
    where none can."""
    return sdpa_kernel([*DENSE_BACKENDS, SDPBackend.MATH], set_priority=True)


def grow_segments() -> None:
    """Have PyTorch's allocator map memory to segments that grow, rather than take fixed ones.

    A step's tensors are few and large, and of many sizes: gaps in fixed segments took 18 GiB in a
    step of `hunyuan_2x`, in growing ones 3 to 4 in those of `mochi_4x` and `wan_14b_2x`
    (benchmarks/results/2026-11-23-training-h200.md). To be called before anything is on a GPU, or
    it has no effect. What the user's environment says of the allocator is left alone.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
