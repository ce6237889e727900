"""Blocks of Wan-14B at full width, random weights, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import AllBlocks
from torch import Tensor, nn

from longreel.kernels.block_sparse.op import Backend
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Radial, SparsePattern
from longreel.trainer import flow, lora
from longreel.trainer.config import Sigma
from longreel.trainer.families import FAMILIES

pytestmark = pytest.mark.gpu
WAN = FAMILIES["wan"]


class MaskedAttention(SparseAttention):
    """The same layout as a dense mask over tokens, in plain PyTorch."""

    def attention(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.current is not None
        kept = self.layout(self.current.grid).to_dense()[0].to(q.device)
        token = torch.arange(q.shape[1], device=q.device) // self.block
        mask = kept[token][:, token]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.fixture(scope="module")
def wan_14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, saved so that they load as a run loads them: some modules stay in fp32."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(num_layers=2)  # diffusers' defaults are the 14B's
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (40, 128)
    folder = tmp_path_factory.mktemp("wan_14b")
    model.to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    return WAN.load_transformer(str(folder), None, dtype).cuda().train()


def with_lora(model: nn.Module, attention: SparseAttention) -> dict[str, nn.Parameter]:
    parameters = dict(lora.attach(model, WAN, rank=128))
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in parameters.items():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            with torch.no_grad():
                parameter.normal_(std=0.02, generator=generator)
    WAN.install(model, attention)
    model.enable_gradient_checkpointing(attention.checkpoint)
    return parameters


def inputs(frames: int, height: int, width: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(2)
    clean = torch.randn(1, 16, frames, height, width, device="cuda", generator=generator)
    text = torch.randn(1, 512, 4096, device="cuda", generator=generator)
    return clean, {"encoder_hidden_states": text}


def test_lora_steps_at_161_frames(wan_14b: Path):
    """41 latent frames of 720 x 1280: 147,600 tokens, two blocks, three optimizer steps."""
    attention = SparseAttention(Radial())
    model = load(wan_14b, torch.bfloat16)
    parameters = with_lora(model, attention)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    clean, text = inputs(41, 90, 160)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        noise, sigma = flow.sample(clean, Sigma(), generator)
        loss = flow.flow_matching_loss(WAN, model, clean, text, sigma, noise)
        loss.backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None and parameter.dtype == torch.float32, name
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert len(attention.current.grid) == 147_600
    print(f"losses {losses}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


@pytest.mark.parametrize(
    ("pattern", "backend", "density"),
    [(Radial(), "triton", 0.679), (AllBlocks(), "triton", 1), (AllBlocks(), "flex", 1)],
)
def test_equals_the_masked_reference(
    wan_14b: Path, pattern: SparsePattern, backend: Backend, density: float
):
    """On a grid of 21 x 9 x 16 tokens (n = 3024, ragged), output and LoRA gradients in bf16 are at
    most twice as far from fp32 as plain PyTorch's masked attention in bf16 is."""
    clean, text = inputs(21, 18, 32)
    noise, sigma = torch.randn_like(clean), torch.full((1,), 0.7, device="cuda")

    def run(dtype: torch.dtype, attention: SparseAttention) -> dict[str, Tensor]:
        model = load(wan_14b, dtype)
        parameters = with_lora(model, attention)
        noisy = flow.add_noise(clean, noise, sigma)
        out = WAN.predict(model, noisy, sigma, text)
        F.mse_loss(out, WAN.target(clean, noise)).backward()
        return {"out": out.detach(), **{n: p.grad for n, p in parameters.items()}}

    exact = run(torch.float32, MaskedAttention(pattern))
    plain = run(torch.bfloat16, MaskedAttention(pattern))
    attention = SparseAttention(pattern, backend=backend)
    ours = run(torch.bfloat16, attention)
    grid = WAN.grid(clean.shape, (1, 2, 2))
    assert attention.layout(grid).density == pytest.approx(density, abs=1e-3)
    for name, oracle in exact.items():
        error, allowed = ((x[name] - oracle).norm().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.3e} against {allowed:.3e}"
