"""QK norm with RoPE compiled on an NVIDIA GPU: every family small, then real sizes."""

import pytest
import torch
from norms import BF16, NORM_CASES, NormCase, check_norm_rope
from testing import assert_within_budget

from longreel.kernels.norm_rope import norm_rope

pytestmark = pytest.mark.gpu

REAL = {
    "hunyuan, one stream": NormCase("hunyuan", BF16, 30_077, 30_000, 0, 24, 128),
    "hunyuan, two streams": NormCase("hunyuan", BF16, 30_000, 30_000, 77, 24, 128),
    "mochi": NormCase("mochi", BF16, 22_259, 22_259, 256, 24, 128),
    "wan 1.3b": NormCase("wan", BF16, 32_760, 32_760, 0, 12, 128),
    "wan 14b": NormCase("wan", BF16, 18_001, 18_001, 0, 40, 128),
}


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_small(case):
    check_norm_rope(case, "triton", "cuda")


@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_real_sizes(case):
    check_norm_rope(case, "triton", "cuda")


def run(case, inputs, backend="triton", compute=norm_rope):
    leaves = {name: inputs[name] for name in ("x", "text") if inputs[name] is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = compute(**inputs | leaves, **case.options, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(out.shape, device="cuda", generator=generator).to(out.dtype)
    return out, *torch.autograd.grad(out, leaves.values(), grad)


def test_repeats_are_bit_equal():
    case = REAL["hunyuan, two streams"]
    inputs = case.make("cuda")
    for a, b in zip(run(case, inputs), run(case, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["hunyuan, two streams", "wan"])
def test_compiles_into_one_graph(name):
    case = NORM_CASES[name]
    inputs = case.make("cuda")
    compiled = torch.compile(norm_rope, fullgraph=True)
    for a, b in zip(run(case, inputs, compute=compiled), run(case, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.large
@pytest.mark.parametrize("family", ["hunyuan", "wan"])
def test_past_2_31_elements(family):
    """HunyuanVideo at four times its length in a batch of two: the last tokens count too."""
    case = NormCase(family, BF16, 400_000, 400_000, 0, 24, 128)
    angles = 50 * torch.randn(case.tokens, 64, device="cuda")
    size = 128 * (24 if family == "wan" else 1)
    inputs = {
        "x": torch.randn(2, case.tokens, 24, 128, device="cuda", dtype=BF16),
        "weight": 1 + 0.3 * torch.randn(size, device="cuda").to(BF16),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "text": None,
        "text_weight": None,
    }
    assert inputs["x"].numel() > 2**31
    out, grad = run(case, inputs)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = torch.randn(out.shape, device="cuda", generator=generator).to(BF16)
    for place in (slice(0, 50), slice(case.tokens - 50, case.tokens)):
        results = {}
        for dtype in (BF16, torch.float64):
            wide = torch.promote_types(dtype, torch.float32)
            cut = {name: inputs[name][place].to(wide) for name in ("cos", "sin")}
            leaf = inputs["x"][:, place].to(dtype).detach().requires_grad_()
            weight = inputs["weight"].to(dtype)
            part = norm_rope(leaf, weight, **cut, **case.options, backend="reference")
            results[dtype] = part, *torch.autograd.grad(part, leaf, upstream[:, place].to(dtype))
        for name, got, same, exact in zip(
            ("out", "grad"), (out, grad), results[BF16], results[torch.float64], strict=True
        ):
            assert_within_budget(name, got[:, place], same, exact)
