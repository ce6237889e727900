"""Linear layers with float8 weights against bf16: time, memory and error.

    python benchmarks/float8.py [--tokens 75600] [--seconds 1]

One process on one GPU, random normal inputs. Each layer of a block at its published width is first
compared, on a slice of tokens, with the fp64 product of its rounded values; a layer that fails is
reported as wrong and not timed. The rows take turns; times are medians by CUDA events.
"""

import argparse
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from lib.report import RESULTS, dated, measured_on, write
from torch import Tensor, nn

from longreel.trainer.memory.float8 import Float8Linear, check_device, quantise
from longreel.trainer.run.attention_speedup import milliseconds, take_turns

REPEATS = 10
# in and out features: attention's projections, and the two layers of the MLP
LAYERS = {
    "hunyuan to_q": (3072, 3072),
    "hunyuan ff.net.0": (3072, 12288),
    "hunyuan ff.net.2": (12288, 3072),
    "mochi ff.net.0": (3072, 16384),
    "mochi ff.net.2": (8192, 3072),
    "wan 14b to_q": (5120, 5120),
    "wan 14b ffn.0": (5120, 13824),
    "wan 14b ffn.2": (13824, 5120),
}
NOTES = (
    "Forward / backward; backward is the gradient of the input alone, in bf16 for both. "
    "Quantising: the share of the float8 forward that turns activations into e4m3. Error: of the "
    "output against bf16, relative. MiB: the weight's."
)


def step(layer: nn.Linear, x: Tensor, grad: Tensor) -> tuple[float, float]:
    """Return the milliseconds of each pass."""
    forward, out = milliseconds(lambda: layer(x))
    backward, _ = milliseconds(lambda: torch.autograd.grad(out, x, grad))
    return forward, backward


def complaint(layer: Float8Linear, x: Tensor) -> str:
    """Return why its times would mean nothing; empty if it multiplies the rounded values."""
    values, scale = quantise(x)
    exact = values.double() * scale.double() @ layer.dequantised(torch.float64).T
    error = ((layer(x).double() - exact).norm() / exact.norm()).item()
    return "" if error < 2**-8 else f"wrong: off by {error:.1e}"


def megabytes(*tensors: Tensor) -> str:
    return f"{sum(x.numel() * x.element_size() for x in tensors) / 2**20:.0f}"


def row(name: str, tokens: int, seconds: float) -> str:
    """Return a layer's line of the table."""
    inputs, outputs = LAYERS[name]
    bf16 = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    bf16.requires_grad_(False)
    ours = Float8Linear(bf16)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    wrong = complaint(ours, x[:1024])
    if wrong:
        return f"| {name} | {wrong} | | | | |"
    stock = bf16(x[:1024])
    error = ((ours(x[:1024]) - stock).norm() / stock.norm()).item()
    grad = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    steps: dict[str, Callable[[], tuple[float, ...]]] = {
        "bf16": partial(step, bf16, x, grad),
        "float8": partial(step, ours, x, grad),
        "quantising": lambda: (milliseconds(lambda: quantise(x.detach()))[0],),
    }
    medians = take_turns(steps, warmups=3, repeats=REPEATS, seconds=seconds)
    cells = [" / ".join(f"{ms:.2f}" for ms in medians[key]) for key in ("bf16", "float8")]
    share = medians["quantising"][0] / medians["float8"][0]
    memory = f"{megabytes(bf16.weight)} / {megabytes(ours.weight, ours.scale)}"
    return f"| {name} | {' | '.join(cells)} | {share:.0%} | {error:.2%} | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=75_600)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: float8 products need a GPU.")
    check_device(torch.device("cuda"))
    torch.manual_seed(0)
    setup = f"{measured_on()}; {args.tokens:,} tokens, medians of at least {REPEATS} repeats."
    lines = [
        "| layer | bf16 ms | float8 ms | quantising | error | MiB, bf16 / float8 |",
        "|---|---|---|---|---|---|",
    ]
    for name in LAYERS:
        lines.append(row(name, args.tokens, args.seconds))
        print(lines[-1], flush=True)
    path = dated(args.out, "float8")
    made_by = f"`python benchmarks/float8.py --tokens {args.tokens}`"
    head = [f"# float8 linear layers, {date.today()}", setup, made_by, NOTES]
    write(path, "\n\n".join([*head, "\n".join(lines)]) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
