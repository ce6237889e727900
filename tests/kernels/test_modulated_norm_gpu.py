"""Modulated norms and gated sums compiled on an NVIDIA GPU: small, then real sizes."""

import pytest
import torch
from modulation import BF16, FP32, NORM_CASES, NormCase, check_gate, check_norm

from longreel.kernels.modulated_norm import gated_add, modulated_norm

pytestmark = pytest.mark.gpu

REAL = {
    "mochi": NormCase("rms", tokens=11_130, channels=3072),
    "wan 1.3b": NormCase("layer", shift=FP32, tokens=16_001, channels=1536, mean=2.0),
    "wan 14b": NormCase("layer", shift=FP32, tokens=9_001, channels=5120, mean=2.0),
}


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_small(case):
    check_norm(case, "triton", "cuda")


@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_real_sizes(case):
    check_norm(case, "triton", "cuda")
    check_gate(BF16, FP32, 2, "triton", "cuda", case.tokens, case.channels)


def step(x, y, scale, gate):
    out = gated_add(x, modulated_norm(y, scale, norm="layer", eps=1e-6), gate)
    return out, *torch.autograd.grad(out.float().square().sum(), (x, y))


def make(*shape):
    leaves = [torch.randn(shape, device="cuda").to(BF16).requires_grad_() for _ in range(2)]
    return *leaves, *(torch.randn(shape[0], shape[2], device="cuda") for _ in range(2))


def test_compiles_into_one_graph_and_repeats():
    inputs = make(2, 100, 1536)

    def forward(x, y, scale, gate):
        return gated_add(x, modulated_norm(y, scale, norm="layer", eps=1e-6), gate)

    compiled = torch.compile(forward, fullgraph=True)
    results = [step(*inputs), step(*inputs)]
    out = compiled(*inputs)
    results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs[:2])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.large
def test_past_2_31_elements():
    """Wan 14B at four times its length in a batch of two: the last tokens count too."""
    x, y, scale, gate = make(2, 291_600, 5120)
    assert x.numel() > 2**31
    with torch.no_grad():
        normed = modulated_norm(y, scale, norm="layer", eps=1e-6)
        out = gated_add(x, normed, gate)
        for place in (slice(0, 50), slice(291_550, 291_600)):
            options = {"norm": "layer", "eps": 1e-6, "backend": "reference"}
            close = modulated_norm(y[:, place], scale, **options)
            torch.testing.assert_close(normed[:, place], close)
            expected = gated_add(x[:, place], normed[:, place], gate, backend="reference")
            assert torch.equal(out[:, place], expected)
