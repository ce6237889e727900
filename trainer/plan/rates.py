"""Speed figures of GPUs: measured ones with their source, others scaled from datasheets.

An H200 was measured (2026-11-23: bf16, heads of 128, one process). Other GPUs take its rates times
the ratio of their datasheets' dense bf16 peak or memory bandwidth to the H200's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.values import ConfigError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures, dense, without sparsity; `memory` in GiB is what a process can allocate.

    bf16, fp32: TFLOP/s of tensor cores and of plain fp32. bandwidth: of its memory, TB/s.
    link: to the host, GB/s each way, of PCIe at 16 lanes. peer: to the other GPUs of one machine
        together, GB/s each way, of NVLink. float8: whether they multiply in it, as since Ada.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    peer: float
    float8: bool = True


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 139.8, 989, 67, 4.8, 64, 450),  # NVIDIA H200 SXM
        Gpu("h100", 79.2, 989, 67, 3.35, 64, 450),  # NVIDIA H100 SXM 80 GB
        Gpu("a100", 79.2, 312, 19.5, 2.04, 32, 300, float8=False),  # NVIDIA A100 SXM 80 GB
        Gpu("a100_40", 39.4, 312, 19.5, 1.56, 32, 300, float8=False),  # NVIDIA A100 SXM 40 GB
    )
}
MEASURED = GPUS["h200"]


@dataclass(frozen=True)
class AttentionRate:
    """TFLOP/s of kept blocks at a length of so many tokens, backward counted as 2.5 forwards."""

    tokens: int
    forward: float
    backward: float


# benchmarks/results/2026-11-23-attention-h200-head-dim-128.md: Radial(), 24 heads, 720 x 1280.
# Dense is the cuDNN kernel of SDPA, the fastest that torch ships; torch may choose a slower one.
ATTENTION: dict[str, tuple[AttentionRate, ...]] = {
    "triton": (
        AttentionRate(115_200, 638, 532),
        AttentionRate(230_400, 587, 518),
        AttentionRate(460_800, 561, 508),
    ),
    "fa4": (
        AttentionRate(115_200, 602, 552),
        AttentionRate(230_400, 588, 537),
        AttentionRate(460_800, 577, 524),
    ),
    "flex": (
        AttentionRate(115_200, 395, 391),
        AttentionRate(230_400, 401, 380),
        AttentionRate(460_800, 397, 376),
    ),
    "dense": (AttentionRate(115_200, 603, 544), AttentionRate(230_400, 578, 546)),
}

# TFLOP/s of a bf16 product of 8192^3, the same file. Products in a step are other shapes, with
# biases: this share of it is assumed.
MATMUL = 762.0
MATMUL_SHARE = 0.8
# Share of the datasheet's fp32 peak that the adapter's products reach: assumed, as are the shares
# of the memory's bandwidth and of the links to the host and to other GPUs.
FP32_SHARE = 0.7
BANDWIDTH_SHARE = 0.7
LINK_SHARE = 0.8
# How often what a pass over a block keeps for backward is moved through memory in that pass, by
# norms, RoPE, gates, casts and copies. The one free constant: it made wan_1_3b_2x 5.0 s a step on
# earlier kernels (its header), and hunyuan_2x what it then was (CALIBRATION).
ELEMENTWISE_MOVES = 7.5
# GiB of CUDA context, kernels, libraries' workspaces and the allocator's gaps: assumed.
RESERVE = 2.5

# The largest error, relative, against the measured peaks: tests/trainer/plan/test_measured.py.
MEMORY_ERROR = 0.08

CALIBRATION = (
    "calibrated on hunyuan_2x alone; whole steps of mochi_4x, wan_14b_2x and wan_14b_4x on an H200 "
    "were then within 6% of the seconds and 4% of the GiB predicted before they ran "
    "(benchmarks/results/2026-11-23-training-h200.md), hunyuan_2x without recomputed attention "
    "within 9% and 1%, hunyuan_4x on two within 1% and 5%, four smaller peaks within "
    f"{MEMORY_ERROR:.0%}; reserve and efficiencies are assumed"
)


def gpu_named(name: str) -> Gpu:
    """Raises ConfigError, with what was meant, for a GPU that is not in the table."""
    if name not in GPUS:
        raise ConfigError(f"gpu={name} is unknown.{did_you_mean(name, GPUS)}")
    return GPUS[name]


def note(gpu: Gpu) -> str:
    """Say in one sentence where the rates of `gpu` come from."""
    if gpu is MEASURED:
        return "attention and matrix product rates measured on an H200"
    return (
        f"rates of {gpu.name} not measured: the H200's, scaled by the datasheets' bf16 peak "
        f"({gpu.bf16:g} / {MEASURED.bf16:g} TFLOP/s)"
    )


def attention_rate(gpu: Gpu, kernel: str, tokens: int) -> AttentionRate:
    """Return an attention kernel's rate at the measured length nearest to `tokens` by ratio."""
    rates: Sequence[AttentionRate] = ATTENTION[kernel]
    nearest = min(rates, key=lambda rate: abs(math.log(rate.tokens / tokens)))
    scale = gpu.bf16 / MEASURED.bf16
    return AttentionRate(nearest.tokens, scale * nearest.forward, scale * nearest.backward)


def matmul_rate(gpu: Gpu) -> float:
    """TFLOP/s of bf16 matrix products in a step."""
    return MATMUL_SHARE * MATMUL * gpu.bf16 / MEASURED.bf16
