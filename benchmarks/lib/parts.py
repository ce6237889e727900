"""Show where a step's time goes: sort the kernels of a profiler's trace into parts."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

# Parts of the time that kernels take. They run one after another, so with IDLE they add up to the
# step.
BUSY = ("attention", "matmul", "fp32 matmul", "element-wise", "optimizer", "exchange")
IDLE = "idle"  # no kernel runs: the host is late, or a copy is
COPIES = "copies"  # between host and device, most of them beside kernels
PARTS = (*BUSY, IDLE, COPIES)

ATTENTION = re.compile(
    r"^_(forward|gradients|grad_kv|grad_q|row_sums|round)_kernel|sdpa|cudnn|flash|fmha|flex|attention",
    re.IGNORECASE,
)
# Kernels of these ops have names like those of attention; only the ops tell them apart.
NORM_ROPE, CONVOLUTION = "norm_rope", "convolution"
MATMUL = re.compile(r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|cudnn", re.IGNORECASE)
FP32 = re.compile(r"sgemm|gemm_f32f32|simt|tf32|<float", re.IGNORECASE)
OPTIMIZER = re.compile(r"multi_tensor|_foreach_|adam|kOptimizer", re.IGNORECASE)
LEAST = 1e-4  # seconds in a step; kernels that take less are not listed by name
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
DTYPES = {"float": "fp32", "c10::BFloat16": "bf16", "c10::Float8_e4m3fn": "e4m3"}


class Kernel(NamedTuple):
    """Holds one run of a kernel, or a copy.

    op: the PyTorch op that launched it, empty if unknown. inputs: types and sizes of that op's
    inputs. start, seconds: on the device's clock.
    """

    name: str
    op: str
    inputs: str
    start: float
    seconds: float

    @property
    def part(self) -> str:
        if self.name.startswith("Memcpy"):
            return COPIES if "HtoD" in self.name or "DtoH" in self.name else "element-wise"
        if self.name.startswith("nccl"):
            return "exchange"
        if OPTIMIZER.search(self.name) or OPTIMIZER.search(self.op):
            return "optimizer"
        if NORM_ROPE in self.op:
            return "element-wise"
        if ATTENTION.search(self.name) and CONVOLUTION not in self.op:
            return "attention"
        if MATMUL.search(self.name):
            fp32 = self.inputs.startswith("fp32") if self.inputs else FP32.search(self.name)
            return "fp32 matmul" if fp32 else "matmul"
        return "element-wise"

    @property
    def label(self) -> str:
        """Return kernel, op and inputs, which runs of the same work share."""
        name = self.name.removeprefix("void ").replace("at::native::", "")
        return f"{name[:70]} | {self.op.removeprefix('aten::')} | {self.inputs}"


class Profile(NamedTuple):
    """Holds the profile of one step.

    parts: seconds by PARTS. kernels: part, number of runs and their total seconds by label, for
    labels that take at least LEAST.
    """

    parts: dict[str, float]
    kernels: dict[str, tuple[str, int, float]]


def profiled(function: Callable[[], float]) -> tuple[float, Profile]:
    """Return the host seconds that `function` returns, and where they went on the GPU."""
    # Shapes and types of an op's inputs say more than a kernel's name.
    both = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    with profile(activities=both, record_shapes=True) as watching:
        seconds = function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        watching.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    return seconds, summary(kernels_of(trace["traceEvents"]), seconds)


def kernels_of(events: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """Return the kernels of a trace in Chrome's format, whose times are microseconds."""
    ops = {e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op"}
    found = []
    for event in events:
        if event.get("cat") in ON_DEVICE:
            op = ops.get(event["args"].get("External id"), {"name": "", "args": {}})
            start, seconds = event["ts"] / 1e6, event["dur"] / 1e6
            found.append(Kernel(event["name"], op["name"], _inputs(op["args"]), start, seconds))
    return found


def summary(kernels: Iterable[Kernel], seconds: float) -> Profile:
    """Sum up a step's kernels by part and label; `seconds` is the time of the whole step."""
    parts, by_label = dict.fromkeys(PARTS, 0.0), {}
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        part = kernel.part
        parts[part] += kernel.seconds
        _, runs, spent = by_label.get(kernel.label, (part, 0, 0.0))
        by_label[kernel.label] = part, runs + 1, spent + kernel.seconds
        if part != COPIES:
            stop = kernel.start + kernel.seconds
            busy += max(0.0, stop - max(end, kernel.start))
            end = max(end, stop)
    parts[IDLE] = max(0.0, seconds - busy)
    return Profile(parts, {k: found for k, found in by_label.items() if found[2] >= LEAST})


def _inputs(args: Mapping[str, Any]) -> str:
    """Describe the first three tensors, such as `bf16[1, 2048, 64]`."""
    tensors = [
        f"{DTYPES.get(kind, kind)}{size}"
        for kind, size in zip(args.get("Input type", ()), args.get("Input Dims", ()), strict=False)
        if size and isinstance(size[0], int)
    ]
    return " ".join(tensors[:3])
