"""The block-sparse kernels against compiled FlexAttention, flash-attn-4 and dense attention.

    python benchmarks/attention.py [--head-dim 64] [--grids hunyuan-3600x64 ...] [--resume]
    python benchmarks/attention.py --growth [--heads 8]

One process on one GPU. On each grid the output and gradients of every kernel are first compared
with fp32; a kernel that fails is reported as wrong and not timed. The others take turns, a forward
and a backward pass each; times are medians by CUDA events, after two uncounted runs. The result
file is replaced after each grid; --resume continues the file of the same name, if it was measured
on the same machine with the same settings. --growth measures time against length instead.
"""

import argparse
import shlex
from datetime import date
from pathlib import Path

import torch
from lib import growth
from lib.problem import BLOCK, DEFAULT, Kernel, Problem
from lib.report import RESULTS, dated, measured_on, resumed, with_sections, write
from lib.table import Row, table, verdict

from longreel.sparse.grid import TokenGrid
from longreel.trainer.run.attention_speedup import milliseconds, take_turns

GRIDS = {
    **{f"hunyuan-3600x{frames}": TokenGrid(frames, 45, 80) for frames in (32, 64, 128)},
    **{f"hunyuan-3840x{frames}": TokenGrid(frames, 48, 80) for frames in (32, 64, 128)},
    **{f"mochi-1590x{frames}": TokenGrid(frames, 30, 53) for frames in (56, 112)},
    "wan-3600x41": TokenGrid(41, 45, 80),
    "hunyuan-3600x32+77": TokenGrid(32, 45, 80, text=77),  # as in training
}
GROWTH_GRIDS = [TokenGrid(frames, 45, 80) for frames in (16, 24, 32, 48, 64, 96, 128)]
REPEATS = 3
NOTES = (
    "Cells hold forward / backward / both. TFLOP/s count kept blocks, 4 * heads * head_dim * "
    f"{BLOCK}^2 each forward and 2.5 times that backward, whatever a kernel does inside; of dense "
    "attention all pairs. The ideal is a speedup of 1 / density over dense cuDNN. Flex and dense "
    "cuDNN are the better of their rows, pass by pass. MiB: the peak of both passes beyond inputs, "
    "output and gradients."
)


def compare(args: argparse.Namespace) -> None:
    """Measure grid by grid; the file is replaced after each."""
    path = dated(args.out, "attention", f"head-dim-{args.head_dim}")
    alike = setup(args)
    found, sections = resumed(path, alike) if args.resume else ([], {})
    top = found[2] if found else ceiling()
    print(alike, top, sep="\n\n", flush=True)
    for name in args.grids:
        if name in sections:
            continue
        sections[name] = section(name, args)
        print(f"\n{name}: {sections[name]}", flush=True)
        in_order = {grid: sections[grid] for grid in GRIDS if grid in sections}
        made_by = command(args, "--grids", *in_order)
        head = [f"# Attention, {date.today()}", alike, top, made_by, NOTES]
        write(path, with_sections(head, in_order))
        torch.cuda.empty_cache()
        torch.compiler.reset()  # FlexAttention recompiles for every grid, up to a limit
    print(f"\nwritten to {path}")


def section(name: str, args: argparse.Namespace) -> str:
    """Return one grid's table and the verdict on whether its numbers count."""
    grid = GRIDS[name]
    problem = Problem(grid, args.heads, args.head_dim)
    density = problem.layout.density
    rows = measure(problem, len(grid) <= args.dense_tokens, args.seconds, args.kernels)
    shape = f"{len(grid):,} tokens, {problem.kept_blocks:,} kept blocks, density {density:.3f}."
    judged = verdict(name, torch.cuda.get_device_name(), args.head_dim, rows)
    return "\n\n".join(filter(None, [shape, table(rows, density), judged]))


def measure(
    problem: Problem, with_dense: bool, seconds: float, chosen: list[str] | None
) -> list[Row]:
    """Measure every kernel, or the chosen ones, on one grid."""
    groups = {False: problem.sparse_kernels()}
    if with_dense:
        groups[True] = problem.dense_kernels()
    rows: dict[str, Row] = {}
    right: dict[str, Kernel] = {}
    for dense, kernels in groups.items():
        expected = problem.expected(dense)
        for name in kernels if chosen is None else [x for x in kernels if x in chosen]:
            kernel = kernels[name]
            complaint, memory = kernel.check(expected)
            rows[name] = Row(name, problem.flops(dense), complaint, memory=memory)
            if not complaint:
                right[name] = kernel
    steps = {name: kernel.step for name, kernel in right.items()}
    medians = take_turns(steps, warmups=1, repeats=REPEATS, seconds=seconds)
    for name, (forward, backward) in medians.items():
        rows[name] = rows[name].timed(forward, backward)
    return list(rows.values())


def grow(args: argparse.Namespace) -> None:
    """Measure the time of our default kernels against the number of latent frames."""
    alike = setup(args)
    print(alike, flush=True)
    problems = [Problem(grid, args.heads, args.head_dim) for grid in GROWTH_GRIDS]
    steps = {}
    for grid, problem in zip(GROWTH_GRIDS, problems, strict=True):
        kernel = problem.launched(DEFAULT)
        complaint, _ = kernel.check(problem.expected(dense=False))
        if complaint:
            raise SystemExit(f"error: {DEFAULT} on {grid}: {complaint}")
        steps[grid] = kernel.step
    medians = take_turns(steps, warmups=2, repeats=REPEATS, seconds=args.seconds)
    lengths = [
        growth.Length(grid, problem.kept_blocks, *medians[grid])
        for grid, problem in zip(GROWTH_GRIDS, problems, strict=True)
    ]
    path = dated(args.out, "growth", f"head-dim-{args.head_dim}")
    drawn = path.with_suffix(".svg")
    growth.draw(lengths, drawn)
    head = [f"# Growth with length, {date.today()}", alike, command(args, "--growth"), growth.NOTES]
    found = growth.table(lengths)
    print(f"\n{found}\n")
    write(path, "\n\n".join([*head, found, f"![growth]({drawn.name})"]) + "\n")
    print(f"written to {path} and {drawn}")


def ceiling() -> str:
    """Measure the rate of a large matrix product and describe it in words."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def product() -> tuple[float]:
        return (milliseconds(lambda: a @ b)[0],)

    (elapsed,) = take_turns({"product": product}, warmups=3, repeats=20)["product"]
    rate = 2 * size**3 / 1e9 / elapsed
    return f"The ceiling: a bf16 matrix product of {size}^3 runs at {rate:.0f} TFLOP/s."


def setup(args: argparse.Namespace) -> str:
    """Describe the setup, which must be the same for everything in one result file."""
    return (
        f"{measured_on()}; bf16, batch 1, {args.heads} heads of {args.head_dim}, Radial(), block "
        f"{BLOCK}; medians of at least {REPEATS} repeats and {args.seconds:g} s a row, dense "
        f"attention up to {args.dense_tokens:,} tokens."
    )


def command(args: argparse.Namespace, *rest: str) -> str:
    """Return the command that produces the whole result file."""
    settings = f"--heads {args.heads} --head-dim {args.head_dim} --seconds {args.seconds:g}"
    dense = f"--dense-tokens {args.dense_tokens}"
    if args.kernels:
        rest = "--kernels", *args.kernels, *rest
    return f"`python benchmarks/attention.py {settings} {dense} {shlex.join(rest)}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    parser.add_argument(
        "--grids", nargs="+", choices=GRIDS, default=list(GRIDS), help="all by default"
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="ROW", help='rows by name, such as "flex, heads first"; all'
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help=f"for each row, but {REPEATS} repeats at least"
    )
    parser.add_argument(
        "--dense-tokens", type=int, default=250_000, help="no dense attention on longer sequences"
    )
    parser.add_argument("--growth", action="store_true", help="time against length instead")
    parser.add_argument("--resume", action="store_true", help="keep the grids already in the file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: the kernels need a GPU.")
    torch.manual_seed(0)
    grow(args) if args.growth else compare(args)


if __name__ == "__main__":
    main()
