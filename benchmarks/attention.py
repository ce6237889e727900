"""Block-sparse attention against compiled FlexAttention on the same lists, and dense cuDNN.

    python benchmarks/attention.py [--heads 8] [--head-dim 128] [--write]

One process; every kernel is first checked against fp32 on sampled queries; then all take turns,
and medians by CUDA events are printed. TFLOP/s count kept blocks: 4 * heads * head_dim * block**2
each for the forward pass, 2.5 times that for the backward pass, whatever the kernels do inside.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longreel.kernels.block_sparse import block_sparse_attention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import BlockLayout, build_layout
from longreel.sparse.patterns import Radial

BLOCK = 128
GRIDS = {
    "HunyuanVideo 720p, native": TokenGrid(32, 45, 80, text=77),
    "HunyuanVideo 720p, 2x": TokenGrid(64, 45, 80, text=77),
    "HunyuanVideo 720p, 4x": TokenGrid(128, 45, 80, text=77),
    "Mochi, 2x": TokenGrid(56, 30, 53, text=150),
    "Wan 480p, 2x": TokenGrid(41, 30, 52),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Kernel = tuple[Attend, tuple[Tensor, ...]]


@dataclass
class Problem:
    """One grid's inputs: [1, S, H, D] bf16 and its radial layout."""

    name: str
    grid: TokenGrid
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        shape = (1, len(self.grid), self.heads, self.head_dim)
        *qkv, self.grad = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        self.qkv = tuple(x.requires_grad_() for x in qkv)
        self.layout: BlockLayout = build_layout(Radial(), self.grid, BLOCK).to("cuda")

    def flops(self, dense: bool) -> float:
        """Of the forward pass."""
        pairs = len(self.grid) ** 2 if dense else len(self.layout.row_indices) * BLOCK**2
        return 4.0 * self.heads * self.head_dim * pairs

    def kernels(self, dense: bool) -> dict[str, Kernel]:
        """What to time, with its inputs."""
        lists = (
            self.layout.row_indptr,
            self.layout.row_indices,
            self.layout.col_indptr,
            self.layout.col_indices,
            torch.zeros(self.heads, dtype=torch.int32, device="cuda"),
        )

        def sparse(backend: str) -> Attend:
            settings = {"block": BLOCK, "backend": backend}
            return lambda *qkv: block_sparse_attention(*qkv, *lists, **settings)[0]

        def heads_first(attend: Attend) -> Kernel:
            """Of inputs that lie in memory as FlexAttention likes them, [B, H, S, D]."""
            lying = tuple(
                x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
                for x in self.qkv
            )
            return attend, lying

        found = {
            "triton": (sparse("triton"), self.qkv),
            "flex": (sparse("flex"), self.qkv),
            "flex, heads first": heads_first(sparse("flex")),
        }
        return {**found, "dense cuDNN": (cudnn, self.qkv)} if dense else found

    def check(self, name: str, out: Tensor) -> None:
        """Raise if 64 sampled queries of the last head differ from fp32 by more than bf16 does."""
        rows = torch.randperm(len(self.grid), device="cuda")[:64]
        q, k, v = (x.detach()[0, :, -1].float() for x in self.qkv)
        kept = self.layout.to_dense()[0].cuda()
        key_block = torch.arange(len(k), device="cuda") // BLOCK
        scores = q[rows] @ k.T * self.head_dim**-0.5
        if not name.startswith("dense"):
            scores.masked_fill_(~kept[rows // BLOCK][:, key_block], float("-inf"))
        expected = scores.softmax(-1) @ v
        error = (out[0, rows, -1].float() - expected).norm() / expected.norm()
        if not error < 1e-2:
            raise AssertionError(f"{name} on {self.name}: relative error {error:.1e}")


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
    return out.transpose(1, 2)


def milliseconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(problem: Problem, dense: bool, repeats: int) -> list[tuple[str, float, float]]:
    """(kernel, forward ms, backward ms): medians, the kernels taking turns."""
    kernels = problem.kernels(dense)
    outs = {name: attend(*qkv) for name, (attend, qkv) in kernels.items()}
    for name, out in outs.items():
        problem.check(name, out)
    times = {name: ([], []) for name in kernels}

    def forward(attend: Attend, qkv: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            attend(*qkv)

    def backward(out: Tensor, qkv: tuple[Tensor, ...]) -> None:
        torch.autograd.grad(out, qkv, problem.grad, retain_graph=True)

    for _ in range(repeats + 3):
        for name, (attend, qkv) in kernels.items():
            times[name][0].append(milliseconds(partial(forward, attend, qkv)))
            times[name][1].append(milliseconds(partial(backward, outs[name], qkv)))
    return [(name, *(median(ms[3:]) for ms in pair)) for name, pair in times.items()]


def report(args: argparse.Namespace) -> str:
    """The table, as markdown; each row is printed as it is measured."""
    lines = [
        "| grid | tokens | density | kernel | forward ms | backward ms "
        "| forward TFLOP/s | backward TFLOP/s | both |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n")
    for name in args.grids or GRIDS:
        problem = Problem(name, GRIDS[name], args.heads, args.head_dim)
        with_dense = len(problem.grid) <= args.dense_tokens
        for kernel, forward, backward in measure(problem, with_dense, args.repeats):
            dense = kernel.startswith("dense")
            rate = problem.flops(dense) / 1e9
            lines.append(
                f"| {name} | {len(problem.grid)} | {1 if dense else problem.layout.density:.3f} "
                f"| {kernel} | {forward:.2f} | {backward:.2f} | {rate / forward:.0f} "
                f"| {2.5 * rate / backward:.0f} | {3.5 * rate / (forward + backward):.0f} |"
            )
            print(lines[-1], flush=True)
        del problem
        torch.cuda.empty_cache()
        torch.compiler.reset()  # FlexAttention compiles anew for every grid, up to a limit
    return "\n".join(lines)


def write(table: str, head_dim: int) -> Path:
    """The table with what it takes to measure it again, under benchmarks/results/."""
    device = torch.cuda.get_device_name()
    command = shlex.join(["python", "benchmarks/attention.py", *sys.argv[1:]])
    text = (
        f"# Attention, {date.today()}\n\n"
        f"{device}, torch {torch.__version__}, triton {triton.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}; bf16, batch 1, Radial(), block {BLOCK}.\n\n"
        f"`{command}`\n\n{table}\n"
    )
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    gpu = device.split()[-1].lower()
    path = folder / f"{date.today()}-attention-{gpu}-head-dim-{head_dim}.md"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, help="all by default")
    parser.add_argument(
        "--dense-tokens", type=int, default=150_000, help="no dense attention on longer sequences"
    )
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    args = parser.parse_args()
    torch.manual_seed(0)
    table = report(args)
    if args.write:
        print(f"written to {write(table, args.head_dim)}")


if __name__ == "__main__":
    main()
