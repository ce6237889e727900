"""Blocks of each family's published model at full width, random weights, on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_width import CASES, Case, guidance, inputs, load, save_blocks
from tiny import AllBlocks
from torch import Tensor, nn

from longreel.kernels.block_sparse.op import Backend
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Radial, SparsePattern
from longreel.trainer import flow, lora
from longreel.trainer.config import Sigma

pytestmark = pytest.mark.gpu


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


def with_lora(
    case: Case, model: Any, attention: SparseAttention, targets: str
) -> dict[str, nn.Parameter]:
    parameters = dict(lora.attach(model, case.family, rank=128, targets=targets))
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in parameters.items():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            with torch.no_grad():
                parameter.normal_(std=0.02, generator=generator)
    case.family.install(model, attention)
    model.enable_gradient_checkpointing(attention.checkpoint)
    return parameters


def test_lora_steps_at_the_target_length(case: Case, folder: Path):
    """Three optimizer steps on the blocks; the peak is what one block needs beside its weights."""
    attention = SparseAttention(Radial())
    model = load(case, folder, torch.bfloat16)
    parameters = with_lora(case, model, attention, "attention")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    clean, text = inputs(case, model, case.latents, (100,))
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for step in range(3):
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
    assert all(torch.isfinite(torch.tensor(losses)))
    assert attention.current is not None
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{attention.current.grid}: losses {losses}, peak {peak:.1f} GiB")


@pytest.mark.parametrize(
    ("pattern", "backend"),
    [(Radial(), "triton"), (AllBlocks(), "triton"), (AllBlocks(), "flex")],
)
def test_equals_the_masked_reference(
    case: Case, folder: Path, pattern: SparsePattern, backend: Backend
):
    """On a small ragged grid, two captions of different lengths: output and LoRA gradients in bf16
    are at most twice as far from fp32 as plain PyTorch's masked attention in bf16 is."""

    def run(dtype: torch.dtype, attention: SparseAttention) -> dict[str, Tensor]:
        model = load(case, folder, dtype)
        targets = [*case.family.lora_targets][-1]
        parameters = with_lora(case, model, attention, targets)
        clean, text = inputs(case, model, case.small, (77, 20))
        sigma = torch.tensor([0.7, 0.3], device="cuda")
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3)).cuda()
        noisy = flow.add_noise(clean, noise, sigma)
        out = case.family.predict(model, noisy, sigma, text, guidance(case))
        F.mse_loss(out, case.family.target(clean, noise)).backward()
        grads = {n: p.grad for n, p in parameters.items() if p.grad is not None and p.grad.any()}
        return {"out": out.detach(), **grads}

    exact = run(torch.float32, MaskedAttention(pattern))
    plain = run(torch.bfloat16, MaskedAttention(pattern))
    attention = SparseAttention(pattern, backend=backend)
    ours = run(torch.bfloat16, attention)
    assert attention.current is not None
    density = attention.layout(attention.current.grid).density
    expected = 1 if isinstance(pattern, AllBlocks) else case.density
    assert density == pytest.approx(expected, abs=1e-3)
    assert exact.keys() == plain.keys() == ours.keys() and len(exact) > 8
    for name, oracle in exact.items():
        error, allowed = ((x[name] - oracle).norm().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.3e} against {allowed:.3e}"
