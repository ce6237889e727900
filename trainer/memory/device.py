"""PyTorch settings for GPUs whose defaults do not suit long clips."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# By speed, the fastest first: the order in which torch would choose differs.
DENSE_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def fastest_dense() -> AbstractContextManager[object]:
    """Return a context in which SDPA takes the first of DENSE_BACKENDS that supports its inputs.

    It applies to all threads, and falls back to plain matrix products.
    """
    return sdpa_kernel([*DENSE_BACKENDS, SDPBackend.MATH], set_priority=True)


def grow_segments() -> None:
    """Make PyTorch's CUDA allocator use expandable segments instead of fixed ones.

    A step has few, large tensors of many sizes. Gaps in fixed segments took 18 GiB in a step of
    `hunyuan_2x`; gaps in expandable ones took 3 to 4 GiB in steps of `mochi_4x` and `wan_14b_2x`
    (benchmarks/results/2026-11-23-training-h200.md). It has no effect once anything is on a GPU.
    Allocator settings in the user's environment take precedence.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
