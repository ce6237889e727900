"""Sampling: from an adapter's file, and from a transformer in the middle of training."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from tiny import WAN, randomise

from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Dense, Radial
from longreel.trainer.adapter import lora
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES, installed_attention
from longreel.trainer.sampling.pipeline import (
    _step_of,
    apply_sparse_attention,
    generate,
    load_pipeline,
)

SIZE = {"frames": 13, "height": 48, "width": 64, "steps": 3, "guidance": 4.0, "seed": 3}
PATTERN = Radial(decay=0.5)
ENTRY = {
    "version": 1,
    "family": "wan",
    "model": {"path": "tiny", "revision": None},
    "pattern": {"name": "radial", **asdict(PATTERN)},
    "block": 16,
    "dense_layers": 1,
    "dense_steps": 1,
    "native_frames": 9,
    "frames": 13,
    "height": 48,
    "width": 64,
    "fps": 16,
}


def video_of(pipe, **options):
    return np.stack(list(generate(pipe, **options)))


def in_training(**options):
    """A transformer as the trainer holds it: adapter, sparse attention, training mode."""
    transformer = tiny.load_transformer(WAN)
    randomise(lora.attach(transformer, WAN, rank=4, alpha=8, dropout=0.5))
    attention = SparseAttention(PATTERN, block=16, **options)
    WAN.install(transformer, attention)
    transformer.train()
    return transformer, attention


def recorded(attention, monkeypatch):
    """The plans of every forward from here on."""
    plans, plan = [], attention.plan

    def recording(grid, *, valid=None, step=None):
        plan(grid, valid=valid, step=step)
        plans.append((step, attention.current.dense))

    monkeypatch.setattr(attention, "plan", recording)
    return plans


def test_generate_equals_the_stock_pipeline_call():
    pipe = tiny.load_pipeline(WAN)
    video = video_of(pipe, prompt="a cat", negative="blurry", **SIZE)
    assert video.shape == (13, 48, 64, 3) and video.dtype == np.uint8 and video.std() > 1
    stock = pipe(
        "a cat",
        negative_prompt="blurry",
        num_frames=12,  # the pipeline's rounding makes it 13 for a VAE that keeps every frame
        height=48,
        width=64,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]
    assert np.array_equal(video, (stock * 255).round().astype(np.uint8))


def test_seeds_reproduce_and_differ():
    pipe = tiny.load_pipeline(WAN)
    first, same = (video_of(pipe, prompt="a cat", **SIZE) for _ in range(2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, video_of(pipe, prompt="a cat", **SIZE | {"seed": 4}))


def test_dense_steps_count_a_guided_step_once(monkeypatch):
    transformer, attention = in_training(dense_steps=2)
    plans = recorded(attention, monkeypatch)
    pipe = tiny.load_pipeline(WAN, transformer)
    video_of(pipe, prompt="a cat", **SIZE | {"steps": 4})
    assert plans == [((step, 4), step < 2) for step in (0, 0, 1, 1, 2, 2, 3, 3)]
    plans.clear()
    video_of(pipe, prompt="a cat", **SIZE | {"guidance": 1.0})
    assert plans == [((0, 3), True), ((1, 3), True), ((2, 3), False)]


# Of each family: steps that its schedule takes, forwards a guided step, samples of each.
GUIDED = {"wan": (5, 2, 1), "hunyuan": (5, 1, 1), "mochi": (5, 1, 2)}


def stock_run(family, monkeypatch, *, dense_steps, steps, dtype=torch.float32, **inputs):
    """(step, dense) of every forward of a stock pipeline's call under an adapter's attention, and
    the samples of each."""
    pipe = tiny.load_pipeline(family, tiny.load_transformer(family, dtype), vae=False, text=False)
    entry = ENTRY | {"family": family.name, "dense_steps": dense_steps}
    plans = recorded(apply_sparse_attention(pipe, entry), monkeypatch)
    batches = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    channels = tiny.load_config(family)["in_channels"]
    noise = torch.randn(1, channels, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    size = {"num_frames": 9, "height": 32, "width": 48, "output_type": "latent"}
    pipe(latents=noise, num_inference_steps=steps, **size, **inputs)
    return plans, batches


def guided_inputs(family):
    text, negative = (tiny.make_text(family, seed=seed) for seed in (0, 1))
    negative = None if family.name == "hunyuan" else negative
    return family.text.pipeline_inputs(text, negative, 4.0)


@pytest.mark.parametrize("dense_steps", [2, [-1], [0, -1], []])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_forward_of_a_step_is_planned_as_that_step(family, dense_steps, monkeypatch):
    steps, forwards, samples = GUIDED[family.name]
    plans, batches = stock_run(
        family, monkeypatch, dense_steps=dense_steps, steps=steps, **guided_inputs(family)
    )
    dense = range(2) if dense_steps == 2 else [step % steps for step in dense_steps]
    expected = [((step, steps), step in dense) for step in range(steps)]
    assert plans == [plan for plan in expected for _ in range(forwards)]
    assert batches == [samples] * steps * forwards


def test_true_guidance_of_hunyuan_calls_the_model_twice_a_step(monkeypatch):
    hunyuan = FAMILIES["hunyuan"]
    text, negative = (tiny.make_text(hunyuan, seed=seed) for seed in (0, 1))
    inputs = hunyuan.text.pipeline_inputs(text, negative, 2.0)
    assert inputs["true_cfg_scale"] == 2.0
    plans, batches = stock_run(hunyuan, monkeypatch, dense_steps=[0, -1], steps=3, **inputs)
    assert plans == [((step, 3), step != 1) for step in (0, 0, 1, 1, 2, 2)]
    assert batches == [1] * 6


def test_steps_are_counted_where_bf16_cannot_tell_their_timesteps_apart(monkeypatch):
    """A bf16 HunyuanVideo: with shift 7 and 50 steps, steps 1 and 2 both arrive as 996."""
    hunyuan = FAMILIES["hunyuan"]
    plans, _ = stock_run(
        hunyuan,
        monkeypatch,
        dense_steps=[0, 2, -1],
        steps=50,
        dtype=torch.bfloat16,
        **guided_inputs(hunyuan),
    )
    assert plans == [((step, 50), step in (0, 2, 49)) for step in range(50)]


def test_a_scheduler_that_does_not_count_is_read_by_its_timesteps():
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([999.0, 700.0, 300.0])))
    step = _step_of(pipe)
    assert [step(torch.tensor([t])) for t in (999.0, 700.5, 300.0)] == [(0, 3), (1, 3), (2, 3)]


def test_a_second_run_counts_from_the_first_step_again(monkeypatch):
    transformer, attention = in_training(dense_steps=[0])
    plans = recorded(attention, monkeypatch)
    pipe = tiny.load_pipeline(WAN, transformer)
    for steps in (3, 2):
        plans.clear()
        video_of(pipe, prompt="a cat", **SIZE | {"guidance": 1.0, "steps": steps})
        assert plans == [((step, steps), step == 0) for step in range(steps)]


def test_dense_steps_change_the_video():
    videos = []
    for dense_steps in (0, 1, 3):
        transformer, _ = in_training(dense_steps=dense_steps)
        videos.append(video_of(tiny.load_pipeline(WAN, transformer), prompt="a cat", **SIZE))
    transformer, attention = in_training()
    attention.pattern = Dense()
    dense = video_of(tiny.load_pipeline(WAN, transformer), prompt="a cat", **SIZE)
    assert np.array_equal(videos[2], dense)
    assert not np.array_equal(videos[0], videos[1]) and not np.array_equal(videos[1], dense)


def test_training_goes_on_as_if_nothing_was_sampled():
    transformer, attention = in_training()
    transformer.blocks[1].eval()
    pipe = tiny.load_pipeline(WAN, transformer, text=False)
    attention.plan(TokenGrid(9, 3, 4))
    modes = [module.training for module in transformer.modules()]
    plan, rng = attention.current, torch.random.get_rng_state()
    video_of(pipe, prompt=tiny.make_text(WAN, seed=1), negative=tiny.make_text(WAN, seed=2), **SIZE)
    assert [module.training for module in transformer.modules()] == modes
    assert attention.current is plan and attention.schedule is None
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in transformer.parameters())
    assert not getattr(pipe, "_progress_bar_config", {})


def test_state_comes_back_when_sampling_fails():
    transformer, attention = in_training()
    pipe = tiny.load_pipeline(WAN, transformer)
    pipe.scheduler.step = None
    with pytest.raises(TypeError):
        video_of(pipe, prompt="a cat", **SIZE)
    assert transformer.training and attention.schedule is None and attention.current is None


def test_cached_text_samples_like_its_prompt():
    whole, bare = tiny.load_pipeline(WAN), tiny.load_pipeline(WAN, text=False)
    assert bare.text_encoder is None
    texts = {"prompt": "a cat", "negative": ""}
    cached = {name: WAN.text.encode(whole, text) for name, text in texts.items()}
    expected = video_of(whole, **texts, **SIZE)
    assert np.array_equal(video_of(bare, **cached, **SIZE), expected)
    with pytest.raises(ValueError, match="no text encoder for ''"):
        video_of(bare, prompt=cached["prompt"], **SIZE)


def test_sizes_are_refused_before_sampling():
    pipe = tiny.load_pipeline(WAN, text=False)
    with pytest.raises(ConfigError, match="13 and 17"):
        video_of(pipe, prompt=tiny.make_text(WAN), **SIZE | {"frames": 14})
    with pytest.raises(ConfigError, match="height=50"):
        video_of(pipe, prompt=tiny.make_text(WAN), **SIZE | {"height": 50})


@pytest.fixture
def run(tmp_path):
    """A finished run's folder, and the transformer that was trained in it."""
    transformer, attention = in_training(dense_layers=1, dense_steps=1)
    lora.save(tmp_path / "run", transformer, WAN, ENTRY)
    return tmp_path / "run", transformer


def test_load_pipeline_samples_as_training_did(run, tmp_path):
    folder, transformer = run
    expected = video_of(tiny.load_pipeline(WAN, transformer), prompt="a cat", **SIZE)
    pipe = load_pipeline(folder, device="cpu", cache_dir=tmp_path)
    assert np.array_equal(video_of(pipe, prompt="a cat", **SIZE), expected)
    attention = installed_attention(pipe.transformer)
    assert attention.pattern == PATTERN and attention.block == 16
    assert attention.dense_layers == 1 and attention.dense_steps == 1
    assert pipe.get_active_adapters() == ["longreel"]


def test_a_stock_call_of_a_loaded_pipeline_follows_the_recorded_attention(run, monkeypatch):
    folder, transformer = run
    file = (folder / lora.WEIGHTS).rename(folder / "mine.safetensors")
    pipe = load_pipeline(file, model_path=tiny.folder(WAN), device="cpu")
    plans = recorded(installed_attention(pipe.transformer), monkeypatch)
    frames = pipe("a cat", num_frames=12, height=48, width=64, num_inference_steps=2).frames
    assert frames.shape == (1, 13, 48, 64, 3)
    assert plans == [((0, 2), True), ((0, 2), True), ((1, 2), False), ((1, 2), False)]


def test_dense_sampling_of_an_adapter_is_stock(run):
    folder, transformer = run
    pipe = load_pipeline(folder, model_path=tiny.folder(WAN), device="cpu", sparse=False)
    assert installed_attention(pipe.transformer) is None
    stock = tiny.load_pipeline(WAN)
    stock.load_lora_weights(folder)
    expected = video_of(stock, prompt="a cat", **SIZE)
    assert np.array_equal(video_of(pipe, prompt="a cat", **SIZE), expected)


def test_sparse_attention_on_a_pipeline_of_the_user_s(run):
    folder, transformer = run
    pipe = tiny.load_pipeline(WAN)
    pipe.load_lora_weights(folder)
    apply_sparse_attention(pipe, lora.read_entry(folder))
    expected = video_of(tiny.load_pipeline(WAN, transformer), prompt="a cat", **SIZE)
    assert np.array_equal(video_of(pipe, prompt="a cat", **SIZE), expected)


def shallow():
    """The tiny model without its last layer."""
    transformer = tiny.load_transformer(WAN)
    del transformer.blocks[-1]
    transformer.register_to_config(num_layers=2)
    return transformer


def test_entries_that_do_not_fit_are_refused(run, tmp_path):
    folder, transformer = run
    with pytest.raises(ConfigError, match="family sora"):
        apply_sparse_attention(tiny.load_pipeline(WAN), ENTRY | {"family": "sora"})
    with pytest.raises(ConfigError, match="WanPipeline, the pipeline is a list"):
        apply_sparse_attention([], ENTRY)
    other = tmp_path / "other"
    WAN.loader.load_pipeline(
        tiny.folder(WAN), None, transformer=shallow(), dtype=torch.float32
    ).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"does not fit this model.*\nunexpected: .*blocks\.2"):
        load_pipeline(folder, model_path=str(other), device="cpu")
    with pytest.raises(ConfigError, match="model.path=/moved/away"):
        load_pipeline(folder, model_path="/moved/away", device="cpu")
