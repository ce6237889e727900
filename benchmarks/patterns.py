"""Every pattern: what it computes at the families' lengths, and its time at radial's density.

    python benchmarks/patterns.py --densities [--write]    on a CPU, some minutes
    python benchmarks/patterns.py [--write]                on a GPU, a minute and a half

Times are of one layer's attention as a model calls it, heads' token orders included, and of the
kernel alone. Each pattern's forward and gradients are first compared with the oracle on a small
grid; then all take turns, and medians by CUDA events are printed. --write also fills
docs/patterns.md.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from lib.report import RESULTS, dated, measured_on, write
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from longreel.kernels.block_sparse import block_sparse_attention
from longreel.kernels.block_sparse.op import Backend
from longreel.sparse.attention import SparseAttention
from longreel.sparse.density import layer_density, nearest_density
from longreel.sparse.grid import TokenGrid
from longreel.sparse.layout import build_layout
from longreel.sparse.patterns import PATTERNS, Radial, SparsePattern
from longreel.sparse.reach import layers_to_full_reach
from longreel.trainer.memory.device import DENSE_BACKENDS
from longreel.trainer.run.attention_speedup import milliseconds, take_turns

BLOCK = 128
DOCS = Path(__file__).parents[1] / "docs" / "patterns.md"


@dataclass(frozen=True)
class Family:
    """Holds a model's grids at one, two and four native lengths, with text at its maximum."""

    name: str
    heads: int
    grids: tuple[TokenGrid, TokenGrid, TokenGrid]


FAMILIES = (
    Family("Wan 480p", 12, tuple(TokenGrid(f, 30, 52) for f in (21, 41, 81))),
    Family("HunyuanVideo 720p", 24, tuple(TokenGrid(f, 45, 80, 256) for f in (32, 64, 128))),
    Family("Mochi 480p", 24, tuple(TokenGrid(f, 30, 53, 256) for f in (28, 56, 112))),
)
HUNYUAN = FAMILIES[1]
TIMED = HUNYUAN.grids[1]
SMALL = TokenGrid(9, 14, 18, 40)  # for the oracle


def at_radials_density(
    pattern: SparsePattern, grid: TokenGrid, heads: int
) -> tuple[SparsePattern, float, bool]:
    """Return the pattern nearest to radial's density, its density, and whether they match."""
    target = layer_density(Radial(), grid, BLOCK, heads)
    return nearest_density(pattern, grid, target, BLOCK, heads)


# On a CPU


def density_rows() -> Iterator[str]:
    """Yield a Markdown table of densities at the defaults, and of layers to full reach."""
    yield f"| pattern | {' | '.join(family.name for family in FAMILIES)} | layers to full reach |"
    yield f"|---|{len(FAMILIES) * '---|'}---|"
    for name, cls in PATTERNS.items():
        cells = []
        for family in FAMILIES:
            shares = (layer_density(cls(), grid, BLOCK, family.heads) for grid in family.grids)
            cells.append(" / ".join(f"{share:.1%}" for share in shares))
        yield f"| `{name}` | {' | '.join(cells)} | {reach(cls())} |"


def width_rows() -> Iterator[str]:
    """Yield a Markdown table of the widths at which patterns meet radial's density.

    The length is twice the native one. Each width stands with the density that it gives, and with
    the layers to full reach.
    """
    yield f"| pattern | {' | '.join(family.name for family in FAMILIES)} | layers to full reach |"
    yield f"|---|{len(FAMILIES) * '---|'}---|"
    for name, cls in PATTERNS.items():
        if cls.width is None:
            continue
        cells, layers = [], None
        for family in FAMILIES:
            solved, density, met = at_radials_density(cls(), family.grids[1], family.heads)
            width = getattr(solved, cls.width)
            shown = width if isinstance(width, str) else f"{width:.4g}"
            cells.append(f"`{cls.width}={shown}`: {density:.1%}{'' if met else ' (its limit)'}")
            if family is HUNYUAN:
                layers = reach(solved)
        yield f"| `{name}` | {' | '.join(cells)} | {layers} |"


def reach(pattern: SparsePattern) -> int | str:
    """Return the layers to full reach at twice HunyuanVideo's native length, or "never"."""
    return layers_to_full_reach(pattern, TIMED, BLOCK, HUNYUAN.heads) or "never"


def densities() -> dict[str, str]:
    """Return both tables by the name of their place in the docs; print rows as they come."""
    tables = {}
    for name, rows in (("densities", density_rows()), ("widths", width_rows())):
        lines = []
        for row in rows:
            lines.append(row)
            print(row, flush=True)
        tables[name] = "\n".join(lines)
        print()
    return tables


# On a GPU


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs:
    """Holds q, k, v and the output's gradient: `[1, tokens, heads, head_dim]` bf16."""

    def __init__(self, grid: TokenGrid, heads: int, head_dim: int) -> None:
        self.grid, self.heads = grid, heads
        generator = torch.Generator("cuda").manual_seed(0)
        *qkv, self.grad = (
            torch.randn(
                (1, len(grid), heads, head_dim),
                device="cuda",
                dtype=torch.bfloat16,
                generator=generator,
            )
            for _ in range(4)
        )
        self.qkv = tuple(x.requires_grad_() for x in qkv)


def layer(pattern: SparsePattern, grid: TokenGrid, backend: Backend = "auto") -> Attend:
    """Return attention as a model's layer calls it; dense uses the fastest SDPA in torch."""
    attention = SparseAttention(pattern, block=BLOCK, backend=backend)
    attention.plan(grid)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([*DENSE_BACKENDS], set_priority=True):
            return attention.attention(0, q, k, v)

    return attend


def kernel(pattern: SparsePattern, grid: TokenGrid, heads: int) -> Attend | None:
    """Return the kernel alone, without token reordering; None for a pattern without one."""
    layout = build_layout(pattern, grid, BLOCK)
    if layout.order is None:
        return None
    layout = layout.to("cuda")
    lists = (layout.row_indptr, layout.row_indices, layout.col_indptr, layout.col_indices)
    followed = torch.tensor(pattern.head_layouts(heads), dtype=torch.int32, device="cuda")
    return lambda *qkv: block_sparse_attention(*qkv, *lists, followed, block=BLOCK)[0]


def check(name: str, pattern: SparsePattern, inputs: Inputs) -> None:
    """Raise if output or a gradient differs from the fp32 oracle's by more than bf16 does; a wrong
    block would be off by a tenth and more."""
    out = layer(pattern, inputs.grid)(*inputs.qkv)
    got = (out, *torch.autograd.grad(out, inputs.qkv, inputs.grad))
    exact = tuple(x.detach().float().requires_grad_() for x in inputs.qkv)
    out = layer(pattern, inputs.grid, "reference")(*exact)
    want = (out, *torch.autograd.grad(out, exact, inputs.grad.float()))
    for part, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = ((x.float() - y).norm() / y.norm()).item()
        if not error < 2e-2:
            raise AssertionError(f"{name}: relative error {error:.1e} of {part}")


def timed(args: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    small = Inputs(SMALL, args.heads, args.head_dim)
    for name, cls in PATTERNS.items():
        check(name, cls(), small)
    print(f"all patterns agree with the oracle on {SMALL}", flush=True)

    patterns: dict[str, tuple[SparsePattern, float]] = {}
    calls: dict[tuple[str, bool], Attend] = {}  # by pattern and whether only the kernel is timed
    for name, cls in PATTERNS.items():
        pattern, density = cls(), 1.0
        if cls.width is not None:
            pattern, density, _ = at_radials_density(pattern, TIMED, args.heads)
        patterns[name] = pattern, density
        calls[name, False] = layer(pattern, TIMED)
        alone = kernel(pattern, TIMED, args.heads)
        if alone is not None:
            calls[name, True] = alone

    inputs = Inputs(TIMED, args.heads, args.head_dim)

    def step(call: Attend) -> tuple[float, float]:
        forward, out = milliseconds(lambda: call(*inputs.qkv))
        backward, _ = milliseconds(lambda: torch.autograd.grad(out, inputs.qkv, inputs.grad))
        return forward, backward

    steps = {key: partial(step, call) for key, call in calls.items()}
    medians = take_turns(steps, warmups=1, repeats=args.repeats)  # the first compiles

    lines = [
        "| pattern | density | forward ms | backward ms | kernel alone: forward ms | backward ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, (pattern, density) in patterns.items():
        whole = medians[name, False]
        cells = [f"{ms:.1f}" for ms in (*whole, *medians.get((name, True), whole))]
        lines.append(f"| `{pattern}` | {density:.1%} | {' | '.join(cells)} |")
    print(*lines, sep="\n")
    return "\n".join(lines)


def write_result(table: str, args: argparse.Namespace) -> Path:
    """Return the table with what is needed to measure it again."""
    command = shlex.join(["python", "benchmarks/patterns.py", *sys.argv[1:]])
    path = dated(RESULTS, "patterns")
    write(
        path,
        f"# Patterns at radial's density, {date.today()}\n\n"
        f"{measured_on()}; bf16, batch 1, {args.heads} heads of "
        f"{args.head_dim}, block {BLOCK}, {TIMED}; medians of {args.repeats}.\n\n"
        f"`{command}`\n\n{table}\n",
    )
    return path


def fill_docs(name: str, table: str) -> None:
    """Put a table between its two marks in docs/patterns.md."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = DOCS.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"error: {DOCS} has no place for {name}: {begin.strip()} {end.strip()}.")
    write(DOCS, f"{before}{begin}{table}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--densities", action="store_true", help="on a CPU, no times")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the tables, in the docs too")
    args = parser.parse_args()
    if args.densities:
        for name, table in densities().items():
            if args.write:
                fill_docs(name, table)
        return
    if not torch.cuda.is_available():
        raise SystemExit("error: times need a GPU; --densities does not.")
    table = timed(args)
    if args.write:
        path = write_result(table, args)
        source = f"From [benchmarks/results/{path.name}](../benchmarks/results/{path.name})."
        fill_docs("times", f"{source}\n\n{table}")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
