"""What a run will take: against published counts, against autograd, and against measured peaks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import tiny
import torch
from runs import train
from torch import nn

from longreel.launch.commands import main
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer import checkpoint, lora, parallel, plan, rates
from longreel.trainer.anatomy import anatomy
from longreel.trainer.config import ConfigError, Memory
from longreel.trainer.estimate import (
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
from longreel.trainer.families import FAMILIES
from longreel.trainer.families.published import PUBLISHED, blank_encoders, blank_transformer
from longreel.trainer.job import Job
from longreel.trainer.learner import Learner
from longreel.trainer.memory import block_checkpoint
from longreel.trainer.recipe import load, recipe_names

H200 = rates.GPUS["h200"]


# Of the recipes when most of the figures below were measured.
AS_MEASURED = {"lora.compute_dtype": "float32", "memory.fused_norms": "false"}


def job_of(recipe, *settings, memory=None, cache=None):
    where = [] if cache is None else [f"cache.dir={cache}"]
    given = AS_MEASURED | dict(setting.split("=") for setting in settings)
    config = load([f"recipe={recipe}", *where, *(f"{k}={v}" for k, v in given.items())])
    if memory is not None:
        config = replace(config, memory=memory)
    return Job.from_config(config, published=True)


# What each recipe trains on: latent grid, text, and the kept share of pairs of a sparse layer.
SIZES = {
    "hunyuan_2x": ((64, 45, 80, 256), 0.1935),
    "hunyuan_4x": ((128, 45, 80, 256), 0.1173),
    "mochi_2x": ((56, 30, 53, 256), 0.2395),
    "mochi_4x": ((112, 30, 53, 256), 0.1456),
    "tiny_hunyuan": ((20, 10, 12, 256), 0.5413),
    "tiny_mochi": ((18, 10, 12, 256), 0.5804),
    "tiny_wan": ((49, 10, 12, 0), 0.2540),
    "wan_14b_2x": ((41, 45, 80, 0), 0.2601),
    "wan_14b_4x": ((81, 45, 80, 0), 0.1624),
    "wan_1_3b_2x": ((41, 30, 52, 0), 0.2980),
    "wan_1_3b_4x": ((81, 30, 52, 0), 0.1860),
}


@pytest.mark.parametrize("recipe", recipe_names())
def test_tokens_and_densities_of_the_recipes(recipe, tmp_path):
    made = plan.plan(job_of(recipe, cache=tmp_path), H200)
    (frames, height, width, text), density = SIZES[recipe]
    grid = made.grid
    assert (grid.frames, grid.height, grid.width, grid.text) == (frames, height, width, text)
    dense = 1 if recipe.startswith("tiny") else 2
    sparse = [pytest.approx(density, abs=5.1e-5)] * (len(made.densities) - dense)
    assert made.densities == [1.0] * dense + sparse


@pytest.mark.parametrize("path, billions", [
    ("hunyuanvideo-community/HunyuanVideo", (12.82, 0.246, 7.6)),
    ("genmo/mochi-1-preview", (10.03, 0.460, 4.76)),
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (14.29, 0.127, 5.68)),
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (1.42, 0.127, 5.68)),
])  # fmt: skip
def test_parameters_are_those_published(path, billions):
    """Of transformer, VAE and text encoders; Llama counts without its head, T5 its encoder."""
    family = next(f for n, f in FAMILIES.items() if n in path.lower().replace("2.1", ""))
    vae, texts = blank_encoders(family, path, None)
    models = [[blank_transformer(family, path, None)], [vae], texts]
    counts = [sum(p.numel() for m in group for p in m.parameters()) / 1e9 for group in models]
    assert counts == [pytest.approx(count, rel=6e-3) for count in billions]


def test_every_recipe_is_of_a_published_model():
    paths = {load([f"recipe={name}"]).model.path for name in recipe_names()}
    assert paths == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_a_block_keeps_are_those_autograd_saves(name, dtype, tmp_path):
    """Every tensor that the forward of a bf16 block saves, once, against the sum of the parts."""
    family = FAMILIES[name]
    job = job_of(f"tiny_{name}", "memory.base_dtype=bfloat16", cache=tmp_path)
    model = anatomy(job)
    transformer = tiny.load_transformer(family, torch.bfloat16)
    lora.attach(transformer, family, rank=model.rank, compute_dtype=dtype)
    family.install(transformer, SparseAttention(Dense()))
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


# GiB that torch allocated at most, H200, 2026-11-22: tests/trainer/test_full_width.py with the
# first and the last block, and wan_1_3b_2x whole (test_gpu_run.py).
@pytest.mark.parametrize("recipe, blocks, peak", [
    ("wan_14b_2x", (0, -1), 55.7),
    ("hunyuan_2x", (0, -1), 50),
    ("mochi_2x", (0, -1), 26),
    ("wan_1_3b_2x", range(30), 16.6),
])  # fmt: skip
def test_peaks_are_those_measured(recipe, blocks, peak):
    job = job_of(recipe)
    model = anatomy(job)
    chosen = tuple(model.blocks[i] for i in blocks)
    left_out = sum(b.params for b in model.blocks) - sum(b.params for b in chosen)
    model = replace(
        model, blocks=chosen, params=model.params - left_out, lora=sum(b.lora for b in chosen)
    )
    tokens = job.grid(job.frames).video + (100 if job.family.text_tokens else 0)
    predicted = training_memory(model, tokens, Knobs()).peak / GIB - rates.RESERVE
    assert predicted == pytest.approx(peak, rel=rates.MEMORY_ERROR)


FASTEST = ["memory.checkpoint=attention", "memory.offload_keep=20"]
FASTEST += ["lora.compute_dtype=bfloat16", "memory.fused_norms=true"]


# benchmarks/results/2026-11-23-training-h200.md: GiB allocated and pinned, and seconds.
@pytest.mark.parametrize("recipe, settings, peak, pinned, seconds", [
    ("hunyuan_2x", [], 74.2, 79, 109.3),
    ("hunyuan_2x", FASTEST, 113.7, 108, 75.1),
    ("mochi_4x", [], 117.7, 0, 57.7),
    ("wan_14b_2x", [], 83.4, 56, 74.9),
    ("wan_14b_4x", [], 135.6, 109, 183.1),
])  # fmt: skip
def test_whole_steps_are_what_was_measured(recipe, settings, peak, pinned, seconds):
    made = plan.plan(job_of(recipe, "train.accumulate=1", *settings), H200)
    assert made.memory.peak / GIB - rates.RESERVE == pytest.approx(peak, rel=0.04)
    assert made.memory.host.get("offload", 0) / GIB == pytest.approx(pinned, rel=0.03)
    assert made.seconds.total == pytest.approx(seconds, rel=0.09)


def test_seconds_are_those_measured():
    """The run that the constant of element-wise work comes from: its header says 5.0 s."""
    assert plan.plan(job_of("wan_1_3b_2x"), H200).seconds.total == pytest.approx(5.0, abs=0.1)


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
    for knobs, times in ((Knobs(), 4.5), (Knobs(checkpoint="attention"), 3.5)):
        flops = work(model, grid, densities, knobs, Passes.of_training(knobs))
        assert flops.attention == pytest.approx(times * once, rel=1e-9)
    assert work(model, grid, densities, Knobs(), SAMPLING).attention == pytest.approx(once)


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


@pytest.mark.parametrize("recipe", ["wan_14b_2x", "mochi_2x", "hunyuan_2x"])
def test_each_knob_lowers_the_part_it_claims(recipe):
    job = job_of(recipe)
    model, tokens = anatomy(job), len(job.grid(job.frames))
    full = training_memory(model, tokens, Knobs())
    none = training_memory(model, tokens, Knobs(checkpoint="none"))
    attention = training_memory(model, tokens, Knobs(checkpoint="attention"))
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


@pytest.mark.parametrize("recipe, gib", [
    ("wan_1_3b_2x", 24), ("mochi_2x", 80), ("hunyuan_2x", 140), ("wan_14b_2x", 80),
])  # fmt: skip
def test_the_longest_length_is_that_of_a_search_through_all(recipe, gib):
    job = job_of(recipe)
    model, step = anatomy(job), job.family.frame_step(job.geometry)
    fitting = [
        frames
        for frames in range(1, 2001, step)
        if training_memory(model, len(job.grid(frames)), Knobs()).peak <= gib * GIB
    ]
    assert 1 < fitting[-1] < 1900
    assert plan.longest_training(job, model, gib * GIB, Knobs()) == fitting[-1]
    job.family.check_frames(fitting[-1], job.geometry)


def test_the_longest_length_ends_with_the_positions():
    job = job_of("wan_1_3b_2x")
    assert plan.longest_frames(job, lambda tokens: True) == 4 * 1023 + 1
    assert plan.longest_frames(job, lambda tokens: False) is None


def test_knobs_are_read():
    assert read_knobs(load(["recipe=mochi_2x", "lora.compute_dtype=float32"])) == Knobs()
    given = ["memory.checkpoint=attention", "memory.mlp_chunk=8", "lora.compute_dtype=bfloat16"]
    assert read_knobs(load(["recipe=mochi_2x", *given])) == Knobs(
        checkpoint="attention", mlp_chunk=8, lora_dtype="bfloat16"
    )


def test_remedies_come_in_order_until_it_fits():
    job = job_of("hunyuan_2x", memory=Memory(checkpoint="none"))
    model, tokens = anatomy(job), len(job.grid(job.frames))

    def found(gib):
        return plan.remedies(job.config, model, tokens, gib * GIB)[0]

    assert list(found(10_000)) == []
    assert list(found(140)) == ["memory.checkpoint=attention", "memory.offload=true"]
    everything = found(10)
    assert list(everything) == [
        "memory.checkpoint=attention",
        "memory.offload=true",
        "memory.offload_keep=0",
        "memory.checkpoint=full",
        "memory.mlp_chunk=16384",
        "lora.compute_dtype=bfloat16",
        "memory.optimizer=adamw8bit",
        "memory.base_dtype=float8",
    ]
    assert list(everything.values()) == sorted(everything.values(), reverse=True)


def test_advice_ends_with_a_length_that_then_fits():
    """Or says that none does which would train."""
    job = job_of("hunyuan_4x", memory=Memory())
    model, tokens = anatomy(job), len(job.grid(job.frames))
    said = plan.advice(job, model, 75 * GIB)
    frames = int(said.rpartition("frames=")[2].partition(",")[0])
    _, knobs = plan.remedies(job.config, model, tokens, 75 * GIB)
    assert 125 <= frames < 509
    for length, fits in ((frames, True), (frames + 4, False)):
        assert (training_memory(model, len(job.grid(length)), knobs).peak <= 75 * GIB) == fits
    assert plan.advice(job, model, 30 * GIB).endswith("not even the native 125 frames fit")


@pytest.mark.parametrize("given", [
    [], ["memory.checkpoint=none"], ["memory.checkpoint=none", "sparse.backend=flex"],
])  # fmt: skip
def test_what_is_advised_loads(given):
    """As far as one goes: each is added to those before it."""
    given = ["memory.offload=false", *given]
    job = job_of("hunyuan_2x", *given)
    settings = dict(setting.split("=") for setting in given)
    for setting in plan.remedies(job.config, anatomy(job), len(job.grid(job.frames)), 0)[0]:
        settings |= [setting.split("=")]
        load(["recipe=hunyuan_2x", *map("=".join, settings.items())])
    assert settings["memory.offload"] == "true"


@pytest.fixture
def gpu(monkeypatch):
    """A device with so many GiB."""

    def of(gib):
        monkeypatch.setattr(plan, "device_memory", lambda device: gib * GIB)
        return torch.device("cpu")

    return of


def test_a_run_is_checked_before_it_loads(gpu):
    job = job_of("wan_14b_2x", memory=Memory())
    assert plan.check_memory(job, gpu(200)) is None
    warning = plan.check_memory(job, gpu(120))
    assert warning and "predicted to take 135" in warning and "has 120.0 GiB" in warning
    assert "memory.offload=true (" in warning
    with pytest.raises(ConfigError, match="adapter alone take 29.7 GiB, and the GPU has 24.0 GiB"):
        plan.check_memory(job, gpu(24))


def test_a_cpu_is_not_checked():
    assert plan.check_memory(job_of("hunyuan_4x"), torch.device("cpu")) is None


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of step 7, as far as messages go."""
    folder = tmp_path / "step-000007"
    folder.mkdir()
    about = {"version": checkpoint.VERSION, "progress": asdict(checkpoint.Progress(7, 1, "", [7]))}
    (folder / checkpoint.STATE).write_text(json.dumps(about))
    return folder


def test_out_of_memory_on_a_gpu(gpu, saved):
    """What the run may take up comes first; the rest would be another run's, once one is saved."""
    job = job_of("wan_14b_2x", memory=Memory())
    kept, predicted, change = plan.how_to_go_on(job, gpu(60), saved).splitlines()
    assert kept == f"Step 7 is saved in {saved}: the same command goes on from there."
    assert predicted.startswith("A step was predicted to take 135.")
    assert predicted.endswith("and the GPU has 60.0 GiB.")
    order = ["memory.offload=true (", "memory.mlp_chunk=16384 (", "in another run.dir, lora.comp"]
    assert [change.find(part) for part in order] == sorted(change.find(part) for part in order)
    assert all(part in change for part in order) and change.count("in another run.dir") == 1

    begins, *_, change = plan.how_to_go_on(job, gpu(60), None).splitlines()
    assert begins == "No step is saved yet: the same command begins the run again."
    assert "lora.compute_dtype" in change and "another run.dir" not in change


def test_out_of_memory_where_it_was_to_fit(gpu, saved):
    """The advice leaves less than what was predicted, and no greater length."""
    job = job_of("wan_14b_2x", memory=Memory())
    *_, predicted, change = plan.how_to_go_on(job, gpu(200), saved).splitlines()
    assert predicted.endswith("the GPU has 200.0 GiB: the prediction is too low.")
    assert "memory.offload=true (" in change and "frames=" not in change
    least = job_of("wan_14b_2x", "lora.compute_dtype=bfloat16", memory=Memory(
        offload=True, offload_keep=0, mlp_chunk=16384, optimizer="adamw8bit", base_dtype="float8"
    ))  # fmt: skip
    *_, change = plan.how_to_go_on(least, gpu(200), saved).splitlines()
    frames = int(change.rpartition("in another run.dir, frames=")[2].partition(",")[0])
    assert 81 <= frames < least.frames


def test_out_of_memory_where_nothing_is_planned(saved):
    """No peaks; and when no setting is left, what remains."""
    cpu = torch.device("cpu")
    *_, change = plan.how_to_go_on(job_of("wan_14b_2x", memory=Memory()), cpu, saved).splitlines()
    assert "memory.offload=true; then memory.offload_keep=0" in change and "GiB" not in change
    assert "memory.optimizer" not in change
    least = job_of("wan_14b_2x", memory=Memory(offload=True, offload_keep=0, mlp_chunk=1))
    *_, change = plan.how_to_go_on(least, cpu, saved).splitlines()
    assert change.endswith(f"first: {plan.NO_SETTING}.")


def test_sampling(tmp_path):
    """Guidance is two forwards for Wan, one of two samples for Mochi, none for HunyuanVideo."""
    made = {
        name: plan.plan_sampling(job_of(f"{recipe}_2x"), H200)
        for name, recipe in (("wan", "wan_1_3b"), ("mochi", "mochi"), ("hunyuan", "hunyuan"))
    }
    assert [(p.steps, p.forwards, p.samples) for p in made.values()] == [
        (50, 100, 1), (64, 64, 2), (50, 50, 1)
    ]  # fmt: skip
    job = job_of("wan_1_3b_2x")
    training = plan.plan(job, H200)
    assert made["wan"].peak < training.memory.peak
    dense = plan.plan_sampling(job_of("wan_1_3b_2x", "sparse.pattern.name=dense"), H200)
    assert dense.seconds.attention > 2 * made["wan"].seconds.attention


def test_the_verdict_knows_the_error_of_the_prediction():
    made = plan.plan(job_of("wan_14b_2x"), H200)
    verdicts = [replace(made, memory_limit=f * made.memory.peak).verdict for f in (0.99, 1.05, 1.1)]
    assert verdicts == ["does not fit", "may fit, by less than 8%", "fits"]


def test_gpus_share_the_samples_and_split_the_hours():
    one, eight = (plan.plan(job_of("wan_14b_2x"), H200, gpus=n) for n in (1, 8))
    assert (one.samples, eight.samples) == (8, 64)
    assert eight.seconds == one.seconds and eight.gpu_hours == pytest.approx(8 * one.gpu_hours)


def test_gpus_that_share_a_sample():
    alone, shared = (
        plan.plan(job_of("wan_14b_2x", *settings), H200, gpus=8)
        for settings in ([], ["parallel.sequence=4"])
    )
    assert (alone.samples, shared.samples) == (64, 16)
    assert shared.exchanged > 0 == alone.exchanged == alone.seconds.exchange
    assert shared.seconds.attention == pytest.approx(alone.seconds.attention / 4)
    assert shared.memory.fixed == alone.memory.fixed
    assert shared.memory.gpu["block inputs"] == pytest.approx(alone.memory.gpu["block inputs"] / 4)
    # As many GPUs as share a sample, if not told; sampling is on one all the same.
    made = plan.plan(job_of("wan_14b_2x", "parallel.sequence=5"), H200)
    assert (made.gpus, made.samples) == (5, 8)
    sampling = [
        plan.plan_sampling(job_of("wan_14b_2x", *settings), H200)
        for settings in ([], ["parallel.sequence=5"])
    ]
    assert sampling[0] == sampling[1]
    with pytest.raises(ConfigError, match=r"40 heads and the number of processes, 6; .*: 1, 2\.$"):
        plan.plan(job_of("wan_14b_2x", "parallel.sequence=4"), H200, gpus=6)


@pytest.mark.parametrize("keeping", ["none", "full", "attention"])
def test_what_is_exchanged_is_what_is_counted(keeping, monkeypatch):
    """By the buffers of a tiny model's forward and backward; the result does not matter here."""
    sent = []

    def pretend(x, group, to, received):
        if x.dim() == 4:  # of attention, not of the prediction
            sent.append(x.nbytes * (1 - to[1] / sum(to)))
        return x.new_zeros(sum(received), *x.shape[1:])

    monkeypatch.setattr(parallel, "_all_to_all", pretend)
    memory = Memory(checkpoint=keeping, base_dtype="float32")
    job, family = job_of("tiny_wan", "parallel.sequence=2", memory=memory), FAMILIES["wan"]
    transformer, attention = tiny.load_transformer(family), job.attention()
    lora.attach(transformer, family, rank=4)
    family.install(transformer, attention)
    blocks = block_checkpoint(memory, attention, torch.device("cpu"))
    if blocks is not None:
        transformer.enable_gradient_checkpointing(blocks)
    parallel.SequenceGroup(size=2, rank=1).attach(family, transformer, attention)
    tiny.forward_backward(transformer.train(), tiny.make_inputs(family, frames=8))
    knobs = read_knobs(job.config)
    counted = exchanged_bytes(anatomy(job), 8 * 3 * 5, knobs, Passes.of_training(knobs))
    assert sum(sent) == counted


def test_cache_sizes_are_those_of_the_latents():
    made = plan.plan(job_of("hunyuan_2x"), H200)
    assert made.clip_bytes == 2 * 16 * 64 * 90 * 160 and made.caption_bytes == 2 * 256 * 4096


def test_a_run_warns_and_explains(arguments, gpu, monkeypatch, capsys):
    """On a device that the smallest run does not fit: with a reserve of 2.5 GiB, none does."""
    gpu(1)

    def fail(self, step, batches):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Learner, "update", fail)
    with pytest.raises(
        SystemExit, match="(?s)CUDA out of memory.*predicted to take 2.5 GiB.*to change"
    ):
        train(arguments)
    told = " ".join(capsys.readouterr().out.split())
    assert "A step is predicted to take 2.5 GiB, and the GPU has 1.0 GiB: it may run out." in told


@pytest.mark.parametrize(("engine", "saved"), [("zero2", 0.9), ("zero3", 20.9), ("fsdp2", 21.0)])
def test_engines_shard_what_they_say(engine, saved, capsys):
    """GiB of one GPU of eight, of HunyuanVideo's 23.9 of weights and 2.3 of the adapter."""
    settings = ["parallel.sequence=8", "gpus=8"]
    of = [
        plan.plan(job_of("hunyuan_4x", "parallel.sequence=8", *more), H200, gpus=8).memory.peak
        for more in ((), (f"parallel.engine={engine}",))
    ]
    assert (of[0] - of[1]) / 2**30 == pytest.approx(saved, abs=0.3)
    main(["plan", "recipe=hunyuan_4x", *settings, f"parallel.engine={engine}"])
    said = " ".join(capsys.readouterr().out.split())
    told = "which a LoRA has few of" if engine == "zero2" else "1/8 of the frozen base on each GPU"
    assert told in said
