"""Operations and seconds of a step, against layouts, exchanges and formulas spelled out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from plans import H200, job_of

from longreel.trainer.adapter import lora
from longreel.trainer.config.schema import Memory
from longreel.trainer.families import FAMILIES
from longreel.trainer.memory.checkpointing import block_checkpoint
from longreel.trainer.parallel import sequence
from longreel.trainer.plan.anatomy import anatomy
from longreel.trainer.plan.estimate import Knobs, read_knobs, training_memory
from longreel.trainer.plan.timing import SAMPLING, Passes, exchanged_bytes, seconds, work


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
    """The buffers are those of a tiny model's forward and backward; the result does not matter
    here."""
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
