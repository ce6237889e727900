"""QK norm with RoPE: the eager twin and the interpreted kernels against the stock modules."""

import pytest
import torch
from norms import BF16, NORM_CASES, NormCase, check_norm_rope

from longreel.kernels.norm_rope import norm_rope

OP = torch.ops.longreel.norm_rope.default
BACKWARD = torch.ops.longreel.norm_rope_backward.default


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_reference(case):
    check_norm_rope(case, "reference")


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_triton(case, interpreted):
    check_norm_rope(case, "triton")


def run(case, inputs, backend="triton"):
    leaves = [x.detach().requires_grad_() for x in (inputs["x"], inputs["text"]) if x is not None]
    names = ("x", "text")[: len(leaves)]
    own = inputs | dict(zip(names, leaves, strict=True))
    out = norm_rope(**own, **case.options, backend=backend)
    return out, *torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("family", ["hunyuan", "wan"])
def test_64_bit_offsets(family, interpreted, tmp_path):
    """Tokens 2**27 elements apart, on a sparse file, so that offsets pass 2**32."""
    case = NormCase(family, BF16, tokens=40, video=40, heads=1)
    inputs = case.make()
    size = case.tokens * 2**27
    wide = torch.from_file(str(tmp_path / "sparse"), True, size, dtype=BF16)
    wide = wide.as_strided((1, case.tokens, 1, case.head_dim), (size, 2**27, case.head_dim, 1))
    wide.copy_(inputs["x"][:1])
    close = run(case, inputs | {"x": wide.contiguous()})
    for got, expected in zip(run(case, inputs | {"x": wide}), close, strict=True):
        assert torch.equal(got, expected)


def test_only_the_text_may_train(interpreted):
    case = NORM_CASES["hunyuan, two streams"]
    inputs = case.make()
    _, _, expected = run(case, inputs)
    text = inputs["text"].detach().requires_grad_()
    out = norm_rope(**inputs | {"text": text}, **case.options, backend="triton")
    (grad,) = torch.autograd.grad(out.float().square().sum(), text)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("name", ["hunyuan, two streams", "mochi", "wan"])
def test_op_obeys_pytorch_s_rules(name, interpreted):
    case = NORM_CASES[name]
    inputs = case.make()
    inputs["x"].requires_grad_()
    arguments = tuple(inputs.values()), tuple(case.options.values())
    torch.library.opcheck(OP, arguments[0] + arguments[1])
    out = norm_rope(**inputs, **case.options)
    x, weight, cos, sin, *_ = (t.detach() if t is not None else None for t in inputs.values())
    grad = torch.randn_like(out[:, : case.tokens])
    torch.library.opcheck(BACKWARD, (grad, x, weight, cos, sin, *arguments[1][:2]))


def test_auto_is_the_reference_on_a_cpu_and_trains_the_weight():
    case = NORM_CASES["mochi"]
    inputs = case.make()
    inputs["weight"].requires_grad_()
    norm_rope(**inputs, **case.options).float().sum().backward()
    assert inputs["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(1, 2, 3, 24)}, "head_dim is 24"),
        ({"x": torch.zeros(1, 2, 16, 16).transpose(2, 3)[..., :16]}, "contiguous in D"),
        ({"weight": torch.ones(32)}, r"weight is \(32,\).*must be \(16,\)"),
        ({"weight": torch.ones(16, dtype=BF16)}, "must be .* torch.float32"),
        ({"cos": torch.ones(14, 8), "sin": torch.ones(14, 8)}, "V at most 13"),
        ({"cos": torch.ones(3, 8)}, "cos and sin must both be"),
        ({"cos": torch.ones(13, 8, dtype=BF16)}, "cos is torch.bfloat16"),
        ({"text": torch.ones(1, 4, 3, 16)}, r"text must be \[2, T, 3, 16\]"),
        ({"text": torch.ones(2, 4, 3, 16, dtype=BF16)}, "text torch.bfloat16"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"backend": "triton", "weight": torch.ones(16).requires_grad_()}, "gradient of weight"),
    ],
)
def test_wrong_inputs_are_named(changes, message, interpreted):
    case = NormCase("hunyuan")
    inputs = case.make() | case.options | {"backend": "reference"} | changes
    with pytest.raises(ValueError, match=message):
        norm_rope(**inputs)


def test_fp64_is_the_reference_s_alone(interpreted):
    case = NormCase("hunyuan", torch.float64)
    with pytest.raises(ValueError, match="does not compute in torch.float64"):
        norm_rope(**case.make(), **case.options, backend="triton")
