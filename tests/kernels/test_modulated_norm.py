"""Modulated norms and gated sums: eager twins and interpreted kernels against the stock modules."""

import pytest
import torch
from modulation import BF16, FP16, FP32, NORM_CASES, NormCase, check_gate, check_norm

from longreel.kernels.modulated_norm import gated_add, modulated_norm

OPS = torch.ops.longreel


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_reference(case):
    check_norm(case, "reference")


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_triton(case, interpreted):
    check_norm(case, "triton")


GATES = [(BF16, FP32, 2), (BF16, BF16, 1), (FP16, FP32, 1), (FP32, FP32, 2)]


@pytest.mark.parametrize("dtype, gate, batch", GATES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gate(backend, dtype, gate, batch, interpreted):
    check_gate(dtype, gate, batch, backend)


def test_64_bit_offsets(interpreted, tmp_path):
    """Tokens 2**27 elements apart, on a sparse file, so that offsets pass 2**32."""
    size = 40 * 2**27
    wide = torch.from_file(str(tmp_path / "sparse"), True, size, dtype=BF16)
    wide = wide.as_strided((1, 40, 16), (size, 2**27, 1))
    close = torch.randn(1, 40, 16).to(BF16)
    wide.copy_(close)
    scale = torch.randn(16)
    options = {"norm": "layer", "eps": 1e-6, "backend": "triton"}
    norms = (modulated_norm(x, scale, **options) for x in (wide, close))
    assert torch.equal(*norms)
    sums = (gated_add(x, x, scale, backend="triton") for x in (wide, close))
    assert torch.equal(*sums)


def test_channels_need_not_be_contiguous(interpreted):
    """A sum's gradient is not contiguous, nor is a transposed input."""
    x = torch.randn(2, 16, 3).requires_grad_().mT
    grads = []
    for backend in ("triton", "reference"):
        normed = modulated_norm(x, norm="layer", eps=1e-6, backend=backend)
        out = gated_add(normed, x, torch.ones(16), backend=backend).sum()
        grads.append(torch.autograd.grad(out, x, retain_graph=True)[0])
    torch.testing.assert_close(*grads)


def test_ops_obey_pytorch_s_rules(interpreted):
    x, y = (torch.randn(2, 3, 16, requires_grad=True) for _ in range(2))
    rows, grad = torch.randn(2, 16), torch.randn(2, 3, 16)
    torch.library.opcheck(OPS.modulated_norm.default, (x, rows, rows[:1], True, 1e-6))
    torch.library.opcheck(OPS.gated_add.default, (x, y, rows))
    plain = x.detach()
    torch.library.opcheck(OPS.modulated_norm_backward.default, (grad, plain, rows, True, 1e-6))
    torch.library.opcheck(OPS.gated_add_backward.default, (grad, rows))


def test_what_modulates_may_train_by_the_reference():
    x, scale = torch.randn(2, 3, 16), torch.randn(16).requires_grad_()
    modulated_norm(x, scale, norm="rms", eps=1e-6).sum().backward()
    assert scale.grad is not None and scale.grad.abs().sum() > 0


X = torch.zeros(2, 3, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": X[0]}, r"x must be \[B, S, C\]"),
        ({"x": torch.zeros(1, 1, 16385)}, "at most 16384 channels"),
        ({"scale": torch.ones(3, 16)}, r"scale must be \[16\], \[2, 16\] or \[2, 1, 16\]"),
        ({"shift": torch.ones(2, 3, 16)}, "shift must be"),
        ({"shift": torch.ones(16, dtype=torch.int32)}, "floating"),
        ({"scale": torch.ones(16, device="meta")}, "scale is on meta, x on cpu"),
        ({"norm": "batch"}, "norm 'batch' is unknown; choose one of rms, layer"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"backend": "triton", "x": X.double()}, "does not compute in torch.float64"),
        ({"backend": "triton", "scale": torch.ones(16).requires_grad_()}, "no gradient of scale"),
    ],
)
def test_wrong_inputs_are_named(changes, message, interpreted):
    with pytest.raises(ValueError, match=message):
        modulated_norm(**{"x": X, "norm": "rms", "eps": 1e-6} | changes)


def test_sums_of_unlike_tensors_are_refused():
    with pytest.raises(ValueError, match="they must be alike"):
        gated_add(X, X.bfloat16(), torch.ones(16))
    with pytest.raises(ValueError, match=r"gate must be \[16\]"):
        gated_add(X, X, torch.ones(15))


def test_case_of_the_right_family_is_compared():
    """Mochi's stock module is an RMS norm, Wan's subtracts the mean: they differ."""
    inputs = NormCase("layer", FP32, mean=3.0).make()
    rms, layer = (modulated_norm(**inputs, norm=norm, eps=1e-6) for norm in ("rms", "layer"))
    assert (rms - layer).abs().max() > 0.1
