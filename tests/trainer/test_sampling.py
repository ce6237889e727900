"""Sampling: from an adapter's file, and from a transformer in the middle of training."""

from dataclasses import asdict

import numpy as np
import pytest
import tiny
import torch
from tiny import WAN, randomise

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense, Radial
from longreel.trainer import lora
from longreel.trainer.config import ConfigError
from longreel.trainer.families import installed_attention
from longreel.trainer.sampling import apply_sparse_attention, generate, load_pipeline

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
    assert plans == [(step, step < 2) for step in (0, 0, 1, 1, 2, 2, 3, 3)]
    plans.clear()
    video_of(pipe, prompt="a cat", **SIZE | {"guidance": 1.0})
    assert plans == [(0, True), (1, True), (2, False)]


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
    attention.plan(WAN.grid((9, 6, 8), (1, 2, 2)))
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
    cached = {name: WAN.encode_text(whole, text) for name, text in texts.items()}
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
    assert attention.dense_layers == {0} and attention.dense_steps == 1
    assert pipe.get_active_adapters() == ["longreel"]


def test_a_stock_call_of_a_loaded_pipeline_follows_the_recorded_attention(run, monkeypatch):
    folder, transformer = run
    file = (folder / lora.WEIGHTS).rename(folder / "mine.safetensors")
    pipe = load_pipeline(file, model_path=tiny.folder(WAN), device="cpu")
    plans = recorded(installed_attention(pipe.transformer), monkeypatch)
    frames = pipe("a cat", num_frames=12, height=48, width=64, num_inference_steps=2).frames
    assert frames.shape == (1, 13, 48, 64, 3)
    assert plans == [(0, True), (0, True), (1, False), (1, False)]


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
    WAN.load_pipeline(
        tiny.folder(WAN), None, transformer=shallow(), dtype=torch.float32
    ).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"does not fit this model.*\nunexpected: .*blocks\.2"):
        load_pipeline(folder, model_path=str(other), device="cpu")
    with pytest.raises(ConfigError, match="model.path=/moved/away"):
        load_pipeline(folder, model_path="/moved/away", device="cpu")
