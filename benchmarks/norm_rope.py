"""QK norm with RoPE: our kernels against the stock modules' arithmetic, eager and compiled.

    python benchmarks/norm_rope.py [--cases "hunyuan, one stream" ...] [--seconds 2]

One process on one GPU, bf16, batch 1, at the shapes of the published models. The output and
gradients of every row are first compared with fp64 at an eighth of the length; their error may be
twice that of the eager row. A row that fails is reported as wrong and not timed. The others take
turns, a forward and a backward pass each; times are medians by CUDA events.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch
from lib.report import RESULTS, dated, measured_on, write
from torch import Tensor

from longreel.kernels.norm_rope import norm_rope
from longreel.trainer.run.attention_speedup import milliseconds, take_turns

REPEATS = 10
NOTES = (
    "Queries of one layer; keys take as long. GB/s count what must move: forward the input once, "
    "the tables once and the output once; backward the gradient, the input and the tables once, "
    "and the input's gradient. Eager is the arithmetic of the stock modules in PyTorch operations; "
    "compiled is torch.compile of that. Cells hold forward / backward."
)


@dataclass(frozen=True)
class Case:
    """Holds a case's numbers of tokens.

    tokens: of the video. own_text: text tokens that follow the video in the same projection. text:
    text tokens that have a projection of their own.
    """

    tokens: int
    heads: int
    own_text: int = 0
    text: int = 0
    across_heads: bool = False
    round_before_weight: bool = False
    frequencies_per_head: bool = False
    head_dim: int = 128


CASES = {
    "hunyuan, one stream": Case(115_200, 24, own_text=77, round_before_weight=True),
    "hunyuan, two streams": Case(115_200, 24, text=77, round_before_weight=True),
    "mochi": Case(89_040, 24, text=77, frequencies_per_head=True),
    "wan 1.3b": Case(63_960, 12, across_heads=True),
    "wan 14b": Case(75_600, 40, across_heads=True),
}


class Problem:
    """Draw random normal inputs of a case, laid out as projections leave them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x = self._projected(case.tokens + case.own_text).requires_grad_()
        self.leaves = [self.x]
        size = case.head_dim * (case.heads if case.across_heads else 1)
        self.rest = {"weight": 1 + 0.3 * torch.randn(size, device="cuda").bfloat16()}
        per_head = (case.heads,) if case.frequencies_per_head else ()
        shape = (case.tokens, *per_head, case.head_dim // 2)
        angles = 50 * torch.randn(shape, device="cuda")
        self.rest |= {"cos": angles.cos(), "sin": angles.sin()}
        self.options = {
            "eps": 1e-6,
            "across_heads": case.across_heads,
            "round_before_weight": case.round_before_weight,
        }
        if case.text:
            self.leaves.append(self._projected(case.text).requires_grad_())
            self.rest["text_weight"] = 1 + 0.3 * torch.randn(size, device="cuda").bfloat16()
        total = case.tokens + case.own_text + case.text
        shape = (1, total, case.heads, case.head_dim)
        self.grad = torch.randn(shape, device="cuda").bfloat16()

    def _projected(self, tokens: int) -> Tensor:
        shape = (1, tokens, self.case.heads, self.case.head_dim)
        return torch.randn(shape, device="cuda").bfloat16()

    def forward(self, compute: Callable, dtype: torch.dtype = torch.bfloat16) -> tuple:
        """Return the output and the leaves for which gradients are taken."""
        leaves = self.leaves
        rest = self.rest
        if dtype != torch.bfloat16:
            leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
            rest = {name: x.to(dtype) for name, x in rest.items()}
        text = leaves[1] if self.case.text else None
        return compute(leaves[0], text=text, **rest, **self.options), leaves

    def results(self, compute: Callable, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Return the output and the gradients."""
        out, leaves = self.forward(compute, dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(dtype))]

    def step(self, compute: Callable) -> tuple[float, float]:
        """Return the milliseconds of each pass."""
        forward, (out, leaves) = milliseconds(lambda: self.forward(compute))
        backward, _ = milliseconds(lambda: torch.autograd.grad(out, leaves, self.grad))
        return forward, backward

    @property
    def bytes(self) -> tuple[int, int]:
        """Return the bytes that each pass must move."""
        tokens = 2 * self.grad.numel()
        tables = 8 * self.rest["cos"].numel()
        return 2 * tokens + tables, 3 * tokens + tables


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return each tensor's largest error, relative to its largest element."""
    pairs = zip(got, exact, strict=True)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def rows(name: str, seconds: float) -> list[str]:
    """Return a case's lines of the table."""
    case = CASES[name]
    eager = partial(norm_rope, backend="reference")
    kernels = {
        "kernel": partial(norm_rope, backend="triton"),
        "eager": eager,
        "compiled": torch.compile(eager),
    }
    small = Problem(replace(case, tokens=case.tokens // 8))
    exact = small.results(eager, torch.float64)
    allowed = [
        2 * error + torch.finfo(torch.bfloat16).eps for error in errors(small.results(eager), exact)
    ]
    complaints = {}
    for kernel, compute in kernels.items():
        found = errors(small.results(compute), exact)
        if any(error > limit for error, limit in zip(found, allowed, strict=True)):
            complaints[kernel] = f"wrong: errors {found}, allowed {allowed}"
    problem = Problem(case)
    steps = {k: partial(problem.step, f) for k, f in kernels.items() if k not in complaints}
    medians = take_turns(steps, warmups=3, repeats=REPEATS, seconds=seconds)
    lines = []
    for kernel in kernels:
        if kernel in complaints:
            lines.append(f"| {name} | {kernel} | {complaints[kernel]} | |")
            continue
        times = medians[kernel]
        rates = [n / 1e6 / ms for n, ms in zip(problem.bytes, times, strict=True)]
        cells = " / ".join(f"{ms:.3f}" for ms in times), " / ".join(f"{r:.0f}" for r in rates)
        lines.append(f"| {name} | {kernel} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: the kernels need a GPU.")
    torch.manual_seed(0)
    setup = f"{measured_on()}; medians of at least {REPEATS} repeats and {args.seconds:g} s a row."
    lines = ["| queries | by | ms | GB/s |", "|---|---|---|---|"]
    for name in args.cases:
        found = rows(name, args.seconds)
        print(*found, sep="\n", flush=True)
        lines += found
        torch.cuda.empty_cache()
        torch.compiler.reset()
    path = dated(args.out, "norm-rope")
    head = [f"# QK norm and RoPE, {date.today()}", setup, "`python benchmarks/norm_rope.py`", NOTES]
    write(path, "\n\n".join([*head, "\n".join(lines)]) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
