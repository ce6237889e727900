"""Modulated norms and gated sums as the stock models compute them, fp64 oracles, and checks."""

from dataclasses import dataclass

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_mochi import MochiModulatedRMSNorm
from testing import assert_within_budget
from torch import Tensor

from longreel.kernels.modulated_norm import gated_add, modulated_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


@dataclass(frozen=True)
class NormCase:
    """Batch 2. scale, shift: their types, None for none; batch: of theirs, 0 for a vector."""

    norm: str
    dtype: torch.dtype = BF16
    tokens: int = 5
    channels: int = 48
    scale: torch.dtype | None = FP32
    shift: torch.dtype | None = None
    batch: int = 2
    mean: float = 0.0

    def make(self, device="cpu") -> dict[str, Tensor | None]:
        """The tensors of `modulated_norm` by name; x a view, as chunks of a projection are."""
        std = torch.rand(2, self.tokens, 1, 1, device=device) * 4
        wide = torch.randn(2, self.tokens, 2, self.channels, device=device) * std + self.mean

        def modulation(dtype, around: float) -> Tensor | None:
            shape = (self.batch, 1, self.channels) if self.batch else (self.channels,)
            made = around + 0.5 * torch.randn(shape, device=device)
            return None if dtype is None else made.to(dtype)

        scale, shift = modulation(self.scale, 1.0), modulation(self.shift, 0.0)
        return {"x": wide.to(self.dtype)[:, :, 1], "scale": scale, "shift": shift}

    @property
    def options(self) -> dict:
        return {"norm": self.norm, "eps": EPS}


def stock_norm(case: NormCase, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Mochi's module; of Wan, what its block does with its module."""
    if case.norm == "rms":
        assert shift is None
        return MochiModulatedRMSNorm(EPS)(x, scale)
    out = FP32LayerNorm(case.channels, EPS, elementwise_affine=False)(x.float())
    out = out if scale is None else out * scale
    return (out if shift is None else out + shift).type_as(x)


def exact_norm(case: NormCase, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if case.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def check_norm(case: NormCase, backend: str, device="cpu") -> None:
    """Within a rounding of the stock arithmetic, and within twice its error, with gradients."""
    inputs = case.make(device)
    grad = torch.randn_like(inputs["x"], dtype=FP32).to(case.dtype)

    def run(compute, dtype: torch.dtype) -> dict[str, Tensor]:
        x = inputs["x"].detach().to(dtype).requires_grad_()
        out = compute(x, inputs["scale"], inputs["shift"])
        return {"out": out.detach(), "x": torch.autograd.grad(out, x, grad.to(dtype))[0]}

    got = run(lambda *own: modulated_norm(*own, **case.options, backend=backend), case.dtype)
    same = run(lambda *own: stock_norm(case, *own), case.dtype)
    compare(got, same, run(lambda *own: exact_norm(case, *own), torch.float64))
    if backend == "reference" and device == "cpu":
        assert torch.equal(got["out"], same["out"])


def compare(got: dict, same: dict, oracle: dict) -> None:
    assert got["out"].is_contiguous() and got["out"].dtype == same["out"].dtype
    for name, expected in oracle.items():
        assert_within_budget(name, got[name], same[name], expected)
    if same["out"].dtype != FP32:  # where a last bit of the statistics tips a rounding over
        assert (got["out"] != same["out"]).double().mean() < 0.01


def check_gate(
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    batch: int,
    backend: str,
    device="cpu",
    tokens: int = 5,
    channels: int = 48,
) -> None:
    """x + y * gate, bit for bit what Wan's block makes of it; gradients within the budget."""
    x, y, grad = (torch.randn(2, tokens, channels, device=device).to(dtype) for _ in range(3))
    gate = torch.randn(batch, 1, channels, device=device).to(gate_dtype)

    def run(compute, wanted: torch.dtype) -> dict[str, Tensor]:
        own = [t.to(wanted, copy=True).requires_grad_() for t in (x, y)]
        out = compute(*own)
        grads = torch.autograd.grad(out, own, grad.to(wanted))
        return {"out": out.detach()} | dict(zip("xy", grads, strict=True))

    got = run(lambda x, y: gated_add(x, y, gate, backend=backend), dtype)
    same = run(lambda x, y: (x.float() + y.float() * gate).type_as(x), dtype)
    compare(got, same, run(lambda x, y: x + y * gate.double(), torch.float64))
    assert torch.equal(got["out"], same["out"])


NORM_CASES = {
    "mochi": NormCase("rms"),
    "mochi, gates": NormCase("rms", scale=BF16),
    "mochi, fp16": NormCase("rms", FP16, channels=64),
    "mochi, fp32": NormCase("rms", FP32),
    "wan": NormCase("layer", shift=FP32, mean=3.0),
    "wan, one vector": NormCase("layer", shift=BF16, scale=BF16, batch=0),
    "wan, one for all": NormCase("layer", shift=FP32, batch=1, tokens=1),
    "wan, fp32": NormCase("layer", FP32, shift=FP32, mean=3.0),
    "bare": NormCase("layer", FP16, scale=None, channels=130),
    "shift alone": NormCase("layer", FP32, scale=None, shift=FP32, channels=33),
}
