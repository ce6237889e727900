"""The frozen base in float8, on a CPU: the numbers of a GPU's product, multiplied in fp32."""

import re

import pytest
import tiny
import torch
from runs import rows, train
from tiny import WAN, forward_backward, make_inputs, randomise
from torch import nn

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load_file
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES
from longreel.trainer.memory import float8
from longreel.trainer.memory.float8 import E4M3, Float8Linear, quantise

BF16 = torch.bfloat16


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def quantised_transformer(family):
    transformer = tiny.load_transformer(family, BF16)
    family.install(transformer, SparseAttention(Dense()))
    float8.quantise_layers(transformer, family.layers.float8)
    return transformer


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("std", [1e-6, 1.0, 300.0])
def test_quantising_rounds_to_three_bits(dtype, std):
    x = (std * torch.randn(50, 64)).to(dtype)
    x[3] = 0
    x[4] = 0
    x[4, 7] = 448 * std
    values, scale = quantise(x)
    assert values.dtype == E4M3 and scale.shape == (50, 1) and scale.dtype == torch.float32
    exponent = scale.log2()
    assert torch.equal(exponent, exponent.round())
    largest = values.float().abs().amax(1)
    used = x.abs().amax(1) > 0
    assert (largest <= 448).all() and (largest[used] >= 208).all()  # no binade is left unused
    back = values.double() * scale.double()
    fine = x.double().abs() > 2**-13 * x.double().abs().amax(1, keepdim=True)
    assert ((back - x.double()).abs() <= 2**-4 * x.double().abs())[fine].all()
    assert torch.equal(back.to(BF16).double(), back)  # turning back is exact


def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 16)
    x[0, 1], x[1, 1] = float("nan"), float("inf")
    values, scale = quantise(x)
    finite = (values.float() * scale).isfinite()
    assert not finite[0, 1] and not finite[1, 1] and finite[2].all()


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_of_what_was_rounded(bias):
    linear = nn.Linear(64, 32, bias=bias).to(BF16)
    ours = Float8Linear(linear)
    x = torch.randn(2, 5, 64).to(BF16).requires_grad_()
    out = ours(x)
    values, scale = quantise(x.detach())
    weight = ours.dequantised(torch.float64)
    exact = (values.double() * scale) @ weight.T
    exact = exact + linear.bias.double() if bias else exact
    assert out.dtype == BF16 and out.shape == (2, 5, 32)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(got.double(), grad.double() @ weight, rtol=2**-7, atol=1e-2)
    stock = linear(x)
    error = ((out - stock).norm() / stock.norm()).item()
    assert 0.01 < error < 0.06  # two roundings to three bits


def test_sizes_that_a_gpu_does_not_take_stay():
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(32, 16))
    assert float8.quantise_layers(model, ".*") == (512, 800 + 792 + 528)
    assert [isinstance(layer, Float8Linear) for layer in model] == [False, False, True]


def test_casting_the_model_leaves_the_weight_alone():
    """A cast to bf16 of real float8 would drop the scale."""
    layer = Float8Linear(nn.Linear(64, 32).to(BF16))
    before = layer.dequantised(torch.float32)
    assert torch.equal(layer.to(BF16).dequantised(torch.float32), before)


STAY = {
    "hunyuan": r"x_embedder|context_embedder|time_text_embed|\.norm1|\.norm\.|norm_out|^proj_out",
    # The tiny model's MLP is 170 wide, the published one's 8192.
    "mochi": r"time_embed|\.norm1|norm_out|^proj_out|\.ff\.|\.ff_context\.",
    "wan": r"condition_embedder|^proj_out",
}


def test_blocks_are_quantised_and_what_steers_them_is_not(family):
    transformer = quantised_transformer(family)
    stay = re.compile(STAY[family.name])
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, Float8Linear) != bool(stay.search(name)), name
        elif next(module.children(), None) is None:
            assert not isinstance(module, Float8Linear)
    assert transformer.dtype == BF16


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft_wraps_the_layers_as_any_others(family, when):
    """It may come before or after: the adapter is fp32 and has stock names."""
    stock = lora.attach(tiny.load_transformer(family, BF16), family, rank=4)
    transformer = tiny.load_transformer(family, BF16)
    layers = family.layers.float8
    if when == "before":
        float8.quantise_layers(transformer, layers)
        parameters = lora.attach(transformer, family, rank=4)
    else:
        parameters = lora.attach(transformer, family, rank=4)
        float8.quantise_layers(transformer, rf"(?!.*lora_)({layers})")
    assert [(n, p.shape, p.dtype) for n, p in parameters] == [
        (n, p.shape, p.dtype) for n, p in stock
    ]
    assert all(p.dtype == torch.float32 for _, p in parameters)
    # On a bf16 layer PEFT draws the same numbers, and rounds them to bf16.
    for (_, p), (_, q) in zip(parameters, stock, strict=True):
        assert torch.equal(p.to(BF16), q.to(BF16))


def weights_alone(family):
    """bf16 products with weights that were quantised and turned back."""
    transformer = tiny.load_transformer(family, BF16)
    quantised = dict(quantised_transformer(family).named_modules())
    for name, module in transformer.named_modules():
        if isinstance(quantised[name], Float8Linear):
            module.weight.data.copy_(quantised[name].dequantised(BF16))
    return transformer


def compare(family, make) -> tuple[float, float]:
    """Relative error of the output, and cosine of the adapter's gradients, against bf16."""
    inputs = make_inputs(family, frames=13, texts=(9, 5), dtype=BF16)
    found = []
    for transformer in (tiny.load_transformer(family, BF16), make(family)):
        family.install(transformer, SparseAttention(Dense()))
        randomise(lora.attach(transformer, family, rank=4))
        out, grads = forward_backward(transformer, inputs)
        flat = torch.cat([grads[name].flatten().double() for name in sorted(grads)])
        found.append((out.double(), flat))
    (stock, stock_grad), (out, grad) = found
    error = ((out - stock).norm() / stock.norm()).item()
    return error, torch.cosine_similarity(grad, stock_grad, dim=0).item()


def test_output_and_gradients_stay_near_those_of_bf16(family, record_property):
    """Rounding activations too costs about as much as rounding the weights, which no library that
    keeps them in float8 avoids."""
    (error, cosine), (least, best) = (
        compare(family, make) for make in (quantised_transformer, weights_alone)
    )
    record_property("output error", error)
    record_property("gradient cosine", cosine)
    print(
        f"{family.name}: output error {error:.2%} (weights alone {least:.2%}), "
        f"gradient cosine {cosine:.5f} ({best:.5f})"
    )
    assert 0 < error < 2 * least
    assert 1 - cosine < 4 * (1 - best)  # goes with the square of the error


def test_a_run_saves_an_adapter_that_stock_diffusers_loads(arguments, tmp_path):
    trainer = train(arguments, "memory.base_dtype=float8")
    assert isinstance(trainer.learner.transformer.blocks[0].ffn.net[2], Float8Linear)
    assert trainer.learner.transformer.dtype == BF16
    assert load_file(trainer.run_dir / "config.yaml").memory.base_dtype == "float8"
    plain = train(arguments, "memory.base_dtype=bfloat16", f"run.dir={tmp_path / 'bf16'}")
    ours, stock = (lora.state_dict(t.learner.transformer) for t in (trainer, plain))
    assert {n: (x.shape, x.dtype) for n, x in ours.items()} == {
        n: (x.shape, x.dtype) for n, x in stock.items()
    }
    for a, b in zip(rows(trainer.run_dir), rows(plain.run_dir), strict=True):
        if a["loss"]:
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=0.02)
    pipe = WAN.loader.load_pipeline(
        tiny.folder(WAN), None, transformer=tiny.load_transformer(WAN, BF16), dtype=BF16
    )
    inputs = make_inputs(WAN, dtype=BF16)
    bare = pipe.transformer(**inputs).sample
    pipe.load_lora_weights(trainer.run_dir, adapter_name="ours")
    assert not torch.equal(pipe.transformer(**inputs).sample, bare)


def test_gpus_without_float8_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ConfigError, match="NVIDIA A100 has 8.0: use memory.base_dtype=bfloat16"):
        float8.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    float8.check_device(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 3600])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gpu_multiplies_the_same_numbers(tokens, bias):
    linear = nn.Linear(3072, 1024, bias=bias).to(BF16)
    there = Float8Linear(linear, torch.device("cuda"))
    here = Float8Linear(linear)
    assert torch.equal(there.weight.cpu(), here.weight) and torch.equal(
        there.scale.cpu(), here.scale
    )
    x = torch.randn(2, tokens, 3072).to(BF16)
    results = []
    grad = torch.randn(2, tokens, 1024).to(BF16)
    for layer, device in ((there, "cuda"), (here, "cpu")):
        own = x.to(device).requires_grad_()
        out = layer(own)
        (got,) = torch.autograd.grad(out, own, grad.to(device))
        results.append((out.cpu(), got.cpu()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
