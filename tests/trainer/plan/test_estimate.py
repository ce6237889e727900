"""Bytes and operations of a step, against autograd and against formulas spelled out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from plans import H200, job_of
from torch import nn

from longreel.kernels.modulated_norm import kernel, op, reference
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Memory
from longreel.trainer.families import FAMILIES
from longreel.trainer.memory.checkpointing import block_checkpoint
from longreel.trainer.parallel import sequence
from longreel.trainer.plan import rates
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.estimate import (
    GIB,
    SAMPLING,
    Knobs,
    Passes,
    exchanged_bytes,
    kept_by_forward,
    read_knobs,
    seconds,
    training_memory,
    work,
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
    monkeypatch.setattr(op, "resolve", lambda *_: "triton")
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


def test_matrix_products_are_the_linear_layers():
    """Wan's blocks, spelled out: four projections, four for the text, and the MLP."""
    job = job_of("wan_1_3b_2x")
    grid, width, mlp, layers = job.grid(job.frames), 1536, 8960, 30
    video = 4 * width**2 + 2 * width**2 + 2 * width * mlp
    forward = 2 * layers * (grid.video * video + 512 * 2 * width**2)
    forward += layers * 4 * grid.video * 512 * width
    flops = work(anatomy(job), grid, [1.0] * layers, Knobs(), SAMPLING)
    assert flops.matmul == pytest.approx(forward)
    assert flops.lora == pytest.approx(2 * grid.video * layers * 4 * 128 * 2 * width)


@pytest.mark.parametrize("recipe", ["wan_1_3b_2x", "mochi_2x", "hunyuan_2x"])
def test_attention_counts_the_pairs_of_the_layout(recipe):
    job = job_of(recipe)
    model, grid, attention = anatomy(job), job.grid(job.frames), job.attention()
    layers, heads = job.geometry.layers, job.geometry.heads
    kept = attention.layout(grid).to_dense()[0].double()
    block, rows = attention.block, len(kept)
    sizes = torch.full((rows,), float(block), dtype=torch.float64)
    sizes[-1] = len(grid) - (rows - 1) * block
    pairs = 2 * len(grid) ** 2 + (layers - 2) * float(sizes @ kept @ sizes)
    densities = attention.layer_densities(grid, layers, heads)
    once = 4 * heads * job.geometry.head_dim * pairs
    for knobs, times in ((Knobs(), 4.5), (Knobs(recompute="all_but_attention"), 3.5)):
        flops = work(model, grid, densities, knobs, Passes.of_training(knobs))
        assert flops.attention == pytest.approx(times * once, rel=1e-9)
    assert work(model, grid, densities, Knobs(), SAMPLING).attention == pytest.approx(once)


@pytest.mark.parametrize("keeping", ["none", "all", "all_but_attention"])
def test_what_is_exchanged_is_what_is_counted(keeping, monkeypatch):
    """By the buffers of a tiny model's forward and backward; the result does not matter here."""
    sent = []

    def pretend(x, group, to, received):
        if x.dim() == 4:  # of attention, not of the prediction
            sent.append(x.nbytes * (1 - to[1] / sum(to)))
        return x.new_zeros(sum(received), *x.shape[1:])

    monkeypatch.setattr(sequence, "_all_to_all", pretend)
    memory = Memory(recompute=keeping, base_dtype="float32")
    job, family = job_of("tiny_wan", "parallel.sequence=2", memory=memory), FAMILIES["wan"]
    transformer, attention = tiny.load_transformer(family), job.attention()
    lora.attach(transformer, family, rank=4)
    family.install(transformer, attention)
    blocks = block_checkpoint(memory, attention, torch.device("cpu"))
    if blocks is not None:
        transformer.enable_gradient_checkpointing(blocks)
    sequence.SequenceGroup(size=2, rank=1).attach(family, transformer, attention)
    tiny.forward_backward(transformer.train(), tiny.make_inputs(family, frames=8))
    knobs = read_knobs(job.config)
    counted = exchanged_bytes(anatomy(job), 8 * 3 * 5, knobs, Passes.of_training(knobs))
    assert sum(sent) == counted


def test_longer_needs_more():
    job = job_of("wan_1_3b_2x")
    model = anatomy(job)
    frames = range(81, 400, 40)
    grids = [job.grid(count) for count in frames]
    peaks = [training_memory(model, len(grid), Knobs()).peak for grid in grids]
    times = [
        seconds(model, grid, job.attention().layer_densities(grid, 30, 12), Knobs(), H200,
                Passes.of_training(Knobs())).total
        for grid in grids
    ]  # fmt: skip
    assert peaks == sorted(set(peaks)) and times == sorted(set(times))


def test_offload_costs_only_what_computation_does_not_hide():
    job = job_of("wan_1_3b_2x")
    model, grid = anatomy(job), job.grid(job.frames)
    passes, knobs = Passes.of_training(Knobs()), Knobs(offload=True)
    dense = seconds(model, grid, [1.0] * 30, knobs, H200, passes)
    assert dense.offload == 0
    slow = seconds(model, grid, [1.0] * 30, knobs, replace(H200, link=0.1), passes)
    assert slow.offload > 0 and slow.attention == dense.attention
