"""Blocks of each family's published model at full width, random weights, on a GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_width import CASES, Case, guidance, inputs, load, save_blocks
from tiny import AllBlocks, fusions
from torch import Tensor, nn

from longreel.kernels.block_sparse.op import Backend
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Radial, SparsePattern
from longreel.trainer import flow
from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Sigma
from longreel.trainer.memory import float8

pytestmark = [pytest.mark.gpu, pytest.mark.large]
FUSED, FLOAT8 = "fused", "base_dtype=float8"


class MaskedAttention(SparseAttention):
    """The same layout as a dense mask over tokens, in plain PyTorch."""

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.current
        assert plan is not None
        kept = self.layout(plan.grid).to_dense()[0].to(q.device)
        token = torch.arange(q.shape[1], device=q.device)
        mask = kept[token // self.block][:, token // self.block][None, None]
        if plan.valid is not None:
            lengths = torch.tensor(plan.valid, device=q.device)
            mask = mask & (token < lengths[:, None])[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(case.family.name)
    save_blocks(case, folder)
    return folder


def load_with(case: Case, folder: Path, dtype: torch.dtype, setting: str) -> Any:
    """setting: FUSED, FLOAT8 or none, of which FLOAT8 has its effect here."""
    model = load(case, folder, dtype)
    if setting == FLOAT8:
        float8.quantise_layers(model, case.family.layers.float8)
    return model


def with_lora(
    case: Case, model: Any, attention: SparseAttention, targets: str, setting: str = ""
) -> dict[str, nn.Parameter]:
    parameters = dict(lora.attach(model, case.family, rank=128, targets=targets))
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in parameters.items():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            with torch.no_grad():
                parameter.normal_(std=0.02, generator=generator)
    options = fusions(case.family) if setting == FUSED else {}
    case.family.install(model, attention, **options)
    model.enable_gradient_checkpointing(attention.recomputing)
    return parameters


@pytest.mark.parametrize("setting", ["", FUSED, FLOAT8])
def test_lora_steps_at_the_target_length(case: Case, folder: Path, setting: str):
    """Two optimizer steps on the blocks; the peak is what one block needs beside its weights."""
    attention = SparseAttention(Radial())
    model = load_with(case, folder, torch.bfloat16, setting)
    parameters = with_lora(case, model, attention, "attention", setting)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    clean, text = inputs(case, model, case.latents, (100,))
    torch.cuda.reset_peak_memory_stats()
    losses = []
    seconds = 0.0
    for step in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(step)
        noise, sigma = flow.sample(clean, Sigma(), generator)
        loss = flow.flow_matching_loss(
            case.family, model, clean, text, sigma, noise, guidance(case)
        )
        loss.backward()
        without = [
            name
            for name, p in parameters.items()
            if p.grad is None or not (p.grad.isfinite().all() and p.grad.any())
        ]
        assert not without, f"step {step}, loss {loss.item()}: no gradient for {without}"
        assert all(p.dtype == torch.float32 for p in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    assert all(torch.isfinite(torch.tensor(losses)))
    assert attention.current is not None
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{attention.current.grid} {setting}: losses {losses}, peak {peak:.1f} GiB, last step "
        f"{seconds:.2f} s"
    )


def small_step(
    case: Case, folder: Path, dtype: torch.dtype, attention: SparseAttention, setting: str = ""
) -> dict[str, Tensor]:
    """The output and the LoRA's gradients on a small ragged grid, two captions of different
    lengths."""
    model = load_with(case, folder, dtype, setting)
    targets = [*case.family.layers.lora_targets][-1]
    parameters = with_lora(case, model, attention, targets, setting)
    clean, text = inputs(case, model, case.small, (77, 20))
    sigma = torch.tensor([0.7, 0.3], device="cuda")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3)).cuda()
    noisy = flow.add_noise(clean, noise, sigma)
    out = case.family.noising.predict(model, noisy, sigma, text, guidance(case))
    F.mse_loss(out, case.family.noising.target(clean, noise)).backward()
    grads = {n: p.grad for n, p in parameters.items() if p.grad is not None and p.grad.any()}
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize(
    ("pattern", "backend"),
    [(Radial(), "triton"), (AllBlocks(), "triton"), (AllBlocks(), "flex")],
)
def test_equals_the_masked_reference(
    case: Case, folder: Path, pattern: SparsePattern, backend: Backend
):
    """Output and LoRA gradients in bf16 are at most twice as far from fp32 as plain PyTorch's
    masked attention in bf16 is."""
    exact = small_step(case, folder, torch.float32, MaskedAttention(pattern))
    plain = small_step(case, folder, torch.bfloat16, MaskedAttention(pattern))
    attention = SparseAttention(pattern, backend=backend)
    ours = small_step(case, folder, torch.bfloat16, attention)
    assert attention.current is not None
    density = attention.layout(attention.current.grid).density
    expected = 1 if isinstance(pattern, AllBlocks) else case.density
    assert density == pytest.approx(expected, abs=1e-3)
    assert exact.keys() == plain.keys() == ours.keys() and len(exact) > 8
    for name, oracle in exact.items():
        error, allowed = ((x[name] - oracle).norm().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.3e} against {allowed:.3e}"


def test_fused_kernels_equal_the_stock_modules(case: Case, folder: Path):
    """Within twice the error that the stock modules have in bf16."""
    exact = small_step(case, folder, torch.float32, SparseAttention(Radial()))
    plain = small_step(case, folder, torch.bfloat16, SparseAttention(Radial()))
    ours = small_step(case, folder, torch.bfloat16, SparseAttention(Radial()), FUSED)
    assert exact.keys() == plain.keys() == ours.keys()
    for name, oracle in exact.items():
        error, allowed = ((x[name] - oracle).norm().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.3e} against {allowed:.3e}"


def test_float8_stays_near_bf16(case: Case, folder: Path):
    """Two roundings to three bits of mantissa in every product: a few percent."""
    plain = small_step(case, folder, torch.bfloat16, SparseAttention(Radial()))
    ours = small_step(case, folder, torch.bfloat16, SparseAttention(Radial()), FLOAT8)
    error = ((ours["out"] - plain["out"]).norm() / plain["out"].norm()).item()
    flat = [torch.cat([x[n].flatten() for n in plain if n != "out"]) for x in (plain, ours)]
    cosine = torch.cosine_similarity(*flat, dim=0).item()
    print(f"{case.family.name}: output error {error:.2%}, gradient cosine {cosine:.4f}")
    assert error < 0.1 and cosine > 0.97
