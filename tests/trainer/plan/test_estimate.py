"""Bytes of a step, against those that autograd saves."""

from __future__ import annotations

import pytest
import tiny
import torch
from plans import job_of
from torch import nn

from longreel.kernels.modulated_norm import kernel, op, reference
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.families import FAMILIES
from longreel.trainer.plan import rates
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.estimate import (
    GIB,
    Knobs,
    kept_by_forward,
    read_knobs,
    training_memory,
)


def test_knobs_are_read():
    assert read_knobs(load(["recipe=mochi_2x", "lora.compute_dtype=float32"])) == Knobs()
    given = [
        "memory.recompute=all_but_attention",
        "memory.mlp_chunk=8",
        "lora.compute_dtype=bfloat16",
    ]
    assert read_knobs(load(["recipe=mochi_2x", *given])) == Knobs(
        recompute="all_but_attention", mlp_chunk=8, lora_dtype="bfloat16"
    )


def fuse_modulation(monkeypatch):
    """Through the custom ops, which decide what is saved, with the eager twins for kernels."""
    monkeypatch.setattr(op, "resolve_fused", lambda *_: "triton")
    monkeypatch.setattr(kernel, "norm", reference.modulated_norm)
    monkeypatch.setattr(kernel, "gate", reference.gated_add)


@pytest.mark.parametrize(
    "name, dtype, fused",
    [
        *((name, dtype, False) for name in FAMILIES for dtype in ("float32", "bfloat16")),
        *((name, "bfloat16", True) for name, f in FAMILIES.items() if f.blocks.fuses_modulation),
    ],
)
def test_bytes_a_block_keeps_are_those_autograd_saves(name, dtype, fused, tmp_path, monkeypatch):
    """Every tensor that the forward of a bf16 block saves, once, against the sum of the parts."""
    family = FAMILIES[name]
    settings = ["memory.base_dtype=bfloat16", f"speed.fused_modulation={str(fused).lower()}"]
    model = anatomy(job_of(f"tiny_{name}", *settings, cache=tmp_path))
    transformer = tiny.load_transformer(family, torch.bfloat16)
    lora.attach(transformer, family, rank=model.rank, compute_dtype=dtype)
    if fused:
        fuse_modulation(monkeypatch)
    family.install(transformer, SparseAttention(Dense()), fused_modulation=fused)
    transformer.train()
    knobs = Knobs(lora_dtype=dtype)
    parameters = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    saved: list[dict[int, int]] = []

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[-1][storage.data_ptr()] = storage.nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    for stack in transformer.children():
        for block in stack if isinstance(stack, nn.ModuleList) else ():
            block.register_forward_pre_hook(lambda *_: saved.append({}) or hooks.__enter__())
            block.register_forward_hook(lambda *_: hooks.__exit__())
    size = (40, 32, 32) if name == "wan" else (8, 32, 32)  # so that 512 words of context are few
    inputs = tiny.make_inputs(family, *size, texts=(8,), dtype=torch.bfloat16)
    transformer(**inputs)
    tokens = size[0] * size[1] * size[2] // 4
    assert len(saved) == len(model.blocks)
    for block, tensors in list(zip(model.blocks, saved, strict=True))[1:]:
        expected = tokens * (sum(kept_by_forward(model, block, knobs).values()) + model.rope)
        if name == "wan":  # on a CPU its norms of q and k keep fp32 copies
            expected += tokens * block.qk_norms
        assert sum(tensors.values()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("recipe", ["wan_14b_2x", "mochi_2x", "hunyuan_2x"])
def test_each_knob_lowers_the_part_it_claims(recipe):
    job = job_of(recipe)
    model, tokens = anatomy(job), len(job.grid(job.frames))
    full = training_memory(model, tokens, Knobs())
    none = training_memory(model, tokens, Knobs(recompute="none"))
    attention = training_memory(model, tokens, Knobs(recompute="all_but_attention"))
    assert none.peak > attention.peak > full.peak
    assert attention.gpu["block inputs"] == pytest.approx(2 * full.gpu["block inputs"], rel=0.02)

    offload = training_memory(model, tokens, Knobs(offload=True))
    one = full.gpu["block inputs"] / job.geometry.layers
    assert offload.gpu["block inputs"] == pytest.approx(3 * one)
    assert offload.host["offload"] == pytest.approx((job.geometry.layers - 1) * one)
    assert "offload" not in full.host
    keep = training_memory(model, tokens, Knobs(offload=True, offload_keep=10))
    assert full.peak > keep.peak > offload.peak

    chunked = training_memory(model, tokens, Knobs(mlp_chunk=8192))
    mlp = "one block: MLP"
    assert chunked.peak < full.peak and chunked.gpu[mlp] < full.gpu[mlp]
    fp8 = training_memory(model, tokens, Knobs(base_dtype="float8"))
    assert 0.5 < fp8.gpu["frozen base"] / full.gpu["frozen base"] < 0.56
    small = training_memory(model, tokens, Knobs(optimizer="adamw8bit"))
    assert small.gpu["LoRA, gradients, moments"] * 16 == full.gpu["LoRA, gradients, moments"] * 10
    halves = training_memory(model, tokens, Knobs(sequence=2))
    fixed = full.fixed + rates.RESERVE * GIB
    # Buffers to send and to receive, of bf16, where attention is what needs most.
    buffers, half = 2 * 2 * model.blocks[0].width * tokens / 2, (full.peak - fixed) / 2
    assert 0.999 * half <= halves.peak - fixed <= 1.001 * half + buffers
