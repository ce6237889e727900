"""bf16 products of an adapter against fp64, and against PEFT's own layer in bf16 throughout."""

import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from tiny import forward_backward, make_inputs, randomise
from torch import nn

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Radial
from longreel.trainer.adapter import lora
from longreel.trainer.adapter.bf16_linear import Bf16Linear, use_bf16_products
from longreel.trainer.config.schema import Memory
from longreel.trainer.families import FAMILIES
from longreel.trainer.memory import float8
from longreel.trainer.memory.checkpointing import block_checkpoint

BF16 = torch.bfloat16


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def adapted(dropout=0.0, bias=True) -> nn.Module:
    """One bf16 layer of 48 channels to 80 with an fp32 adapter of rank 8, scaled by 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias)).to(BF16).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], lora_dropout=dropout)
    inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * p.shape[1] ** -0.5
    return model


def results(model: nn.Module, dtype: torch.dtype, x, grad) -> dict[str, torch.Tensor]:
    x = x.to(dtype).requires_grad_()
    out = model(x)
    out.backward(grad.to(dtype))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_error_is_that_of_bf16(bias, device):
    x, grad = torch.randn(2, 70, 48).to(device, BF16), torch.randn(2, 70, 80).to(device, BF16)
    exact = results(adapted(bias=bias).to(device).double(), torch.float64, x, grad)
    plain = results(adapted(bias=bias).to(device, BF16), BF16, x, grad)
    model = adapted(bias=bias).to(device)
    use_bf16_products(model)
    assert type(model[0]) is Bf16Linear
    ours = results(model, BF16, x, grad)
    assert exact.keys() == plain.keys() == ours.keys() and len(exact) == 4
    for name, expected in exact.items():
        error, allowed = ((r[name].double() - expected).norm() for r in (ours, plain))
        assert error <= 1.2 * allowed, f"{name}: {error:.2e}, bf16 {allowed:.2e}"
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_summed_in_fp32(device):
    """65,536 tokens are summed; a sum in bf16 would stop growing at 256 ones."""
    model = adapted().to(device)
    use_bf16_products(model)
    ones = torch.ones(1, 2**16, 80, device=device)
    results(model, BF16, ones[..., :48], ones)
    inner = model[0].lora_A["default"].weight.to(BF16).float().sum(1).to(BF16).float()
    expected = (2 * 2**16 * inner).expand(80, 8)
    torch.testing.assert_close(model[0].lora_B["default"].weight.grad, expected)


def test_dropout_is_of_training_and_disabled_is_the_base():
    model, x = adapted(dropout=0.5), torch.randn(1, 9, 48).to(BF16)
    use_bf16_products(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    layer = model[0]
    layer.enable_adapters(False)
    assert torch.equal(model(x), layer.base_layer(x))


def trained(family, dtype=BF16, memory=None, base8=False, **options):
    """Output and gradients of a tiny model in training."""
    transformer = tiny.load_transformer(family, dtype)
    if base8:
        float8.quantise_layers(transformer, family.layers.float8)
    randomise(lora.attach(transformer, family, rank=4, **options))
    attention = SparseAttention(Radial(), block=16, dense_layers=1)
    family.install(transformer, attention)
    if memory is not None:
        if memory.mlp_chunk:
            family.blocks.chunk_mlp(transformer, memory.mlp_chunk)
        blocks = block_checkpoint(memory, attention, torch.device("cpu"))
        if blocks is not None:
            transformer.enable_gradient_checkpointing(blocks)
    torch.manual_seed(0)
    inputs = make_inputs(family, texts=(3, 7), dtype=dtype)
    return forward_backward(transformer.train(), inputs)


@pytest.mark.parametrize("base8", [False, True], ids=["bf16 base", "float8 base"])
def test_a_model_trains_as_with_fp32_products(family, base8):
    """A float8 base turns what differs by a rounding into what differs by one of its own."""
    out, grads = trained(family, base8=base8)
    near, low = trained(family, base8=base8, compute_dtype="bfloat16")
    assert grads.keys() == low.keys()
    assert (near - out).float().norm() < (0.06 if base8 else 0.02) * out.float().norm()
    flat = [torch.cat([g[name].flatten() for name in sorted(g)]) for g in (grads, low)]
    assert torch.cosine_similarity(*flat, dim=0) > (0.99 if base8 else 0.999)


@pytest.mark.parametrize(
    "memory",
    [
        Memory(recompute="all"),
        Memory(recompute="all_but_attention"),
        Memory(recompute="all_but_attention", offload=True, mlp_chunk=16),
    ],
)
def test_memory_methods_are_exact(family, memory):
    chunk = Memory(recompute="none", mlp_chunk=memory.mlp_chunk)
    targets = [*family.layers.lora_targets][-1]  # with a layer of the MLP, if the family offers one
    options = {
        "compute_dtype": "bfloat16",
        "targets": targets,
        "dropout": 0.1 * (not chunk.mlp_chunk),
    }
    out, grads = trained(family, memory=chunk, **options)
    same, again = trained(family, memory=memory, **options)
    assert torch.equal(out, same)
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_parameters_and_names_are_those_of_peft(family):
    stock = lora.attach(tiny.load_transformer(family, BF16), family, rank=4)
    transformer = tiny.load_transformer(family, BF16)
    ours = lora.attach(transformer, family, rank=4, compute_dtype="bfloat16")
    assert [(n, p.shape, p.dtype) for n, p in ours] == [(n, p.shape, p.dtype) for n, p in stock]
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(ours, stock, strict=True))
    kinds = {type(m) for m in transformer.modules() if isinstance(m, Linear)}
    assert kinds == {Bf16Linear}
