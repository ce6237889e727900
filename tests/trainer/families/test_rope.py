"""RoPE beyond the native length: the policies' formulas, in each family, and through a run."""

import dataclasses
import logging
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from runs import arguments_of, train
from tiny import WAN, make_inputs

from longreel.launch.commands import main
from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer.adapter import lora
from longreel.trainer.config.recipe import load
from longreel.trainer.config.schema import Rope
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES, RopePolicy, installed_attention, installed_rope
from longreel.trainer.families.rope import NATIVE, TemporalAxis, TemporalRope
from longreel.trainer.families.wan.geometry import WanGeometry
from longreel.trainer.job import Job
from longreel.trainer.sampling.pipeline import apply_rope, load_pipeline

# As published: what time has of a head's 128 channels.
HUNYUAN_AXIS = TemporalAxis(16, 256.0, torch.float32)
WAN_AXIS = TemporalAxis(44, 10000.0, torch.float64)
COGVIDEOX_AXIS = TemporalAxis(16, 10000.0, torch.float32)
FAR = "interpolate", 16, 32  # policy, native and target latent frames


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=["wan", "hunyuan"])
def published(request):
    """The stock module at its published width, its axis, and ours around it by a policy."""
    if request.param == "wan":
        stock, axis, token_dim = WanRotaryPosEmbed(128, (1, 2, 2), 1024), WAN_AXIS, 1
    else:
        stock, axis, token_dim = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56]), HUNYUAN_AXIS, 0
    return (
        stock,
        axis,
        lambda policy: TemporalRope(stock, policy, axis, patch=1, token_dim=token_dim),
    )


def latents(frames, height=4, width=6):
    return torch.zeros(1, 16, frames, height, width)


def by_frame(tables, frames):
    """cos and sin, `[2, frames, tokens of a frame, channels of a head]`."""
    return torch.stack([table.reshape(frames, -1, table.shape[-1]) for table in tables])


# Formulas


@pytest.mark.parametrize(
    "axis, native, k, period",
    [
        (HUNYUAN_AXIS, 32, 4, 50),  # as RIFLEx has it, of videos that repeat after 48
        (COGVIDEOX_AXIS, 13, 2, 20),  # likewise
        (WAN_AXIS, 21, 4, 22),
        (WAN_AXIS, 10**9, 22, 41339),  # all have turned: the lowest
    ],
)
def test_the_intrinsic_frequency_is_the_first_to_repeat_beyond_the_native_length(
    axis, native, k, period
):
    policy = RopePolicy.resolve(Rope("riflex"), native, 2 * native, axis)
    assert policy.k == k and round(axis.period(k)) == period
    assert RopePolicy.resolve(Rope("riflex", k=6), native, 2 * native, axis).k == 6


@pytest.mark.parametrize("axis", [HUNYUAN_AXIS, WAN_AXIS])
@pytest.mark.parametrize("name", ["native", "riflex", "interpolate"])
def test_angles_are_the_papers(axis, name):
    native, target, frames = 20, 64, 64
    policy = RopePolicy.resolve(Rope(name), native, target, axis)
    angles = policy.angles(frames, axis)
    assert angles.shape == (frames, axis.dim // 2) and angles.dtype == axis.dtype
    for j in range(1, axis.dim // 2 + 1):
        theta = axis.theta ** (-2 * (j - 1) / axis.dim)
        if name == "riflex" and j == policy.k:
            assert 2 * math.pi / theta < target
            theta = 0.9 * 2 * math.pi / target
        step = native / target if name == "interpolate" else 1
        expected = [frame * step * theta for frame in range(frames)]
        np.testing.assert_allclose(angles[:, j - 1], expected, rtol=1e-6)


def test_lengths_other_than_the_training_s():
    """Up to it what the LoRA knows; beyond it riflex covers the video, interpolation goes on."""
    riflex = RopePolicy("riflex", 21, 41, k=4)
    periods = {frames: riflex.lowered(frames, WAN_AXIS) for frames in (1, 21, 41, 81)}
    assert periods == pytest.approx({1: 41 / 0.9, 21: 41 / 0.9, 41: 41 / 0.9, 81: 81 / 0.9})
    within = RopePolicy("riflex", 21, 41, k=6)  # a period of 51 latent frames
    assert within.lowered(41, WAN_AXIS) is within.lowered(50, WAN_AXIS) is None
    assert within.lowered(51, WAN_AXIS) == pytest.approx(51 / 0.9)
    interpolate = RopePolicy("interpolate", 21, 42)
    short, long = (interpolate.angles(frames, WAN_AXIS) for frames in (21, 84))
    assert torch.equal(short, long[:21])


def test_what_the_log_says():
    said = {
        RopePolicy("interpolate", 21, 41): "interpolate, temporal positions times 21/41",
        RopePolicy("interpolate", 21, 21): "interpolate, temporal positions unchanged",
        RopePolicy("riflex", 21, 41, k=4): "riflex, temporal frequency 4 of 22 lowered: its period "
        "goes from 22.1 to 45.6 latent frames",
        RopePolicy("riflex", 21, 41, k=6): "riflex, temporal frequency 6 of 22 unchanged: its "
        "period of 51.0 covers 41 latent frames",
    }
    assert {policy: policy.describe(WAN_AXIS) for policy in said} == said
    assert RopePolicy("interpolate", 28, 56).describe(None).endswith("times 28/56")


# Tables, against the stock modules


def test_unchanged_tables_are_the_stock_module_s_to_the_bit(published):
    stock, axis, ours = published
    for policy in (
        NATIVE,
        RopePolicy("interpolate", 51, 51),
        RopePolicy("riflex", 25, 50, k=6 if axis is WAN_AXIS else 4),  # ends before it would repeat
    ):
        tables = ours(policy)(latents(50))
        for table, want in zip(tables, stock(latents(50)), strict=True):
            assert table.shape == want.shape and table.dtype == want.dtype
            assert torch.equal(table, want)


def test_riflex_changes_one_temporal_frequency_and_its_period_covers_the_video(published):
    stock, axis, ours = published
    native = 21 if axis is WAN_AXIS else 32
    frames = 2 * native
    policy = RopePolicy.resolve(Rope("riflex"), native, frames, axis)
    tables, expected = (by_frame(m(latents(frames)), frames) for m in (ours(policy), stock))
    changed = (tables != expected).any(dim=(0, 1, 2)).nonzero().flatten().tolist()
    assert changed == [2 * policy.k - 2, 2 * policy.k - 1]
    cos, sin = tables[:, :, 0, changed[0]].double().numpy()
    turned = np.unwrap(np.arctan2(sin, cos))
    assert (np.diff(turned) > 0).all() and turned[-1] < 0.9 * 2 * math.pi  # not once around
    assert turned[-1] == pytest.approx(0.9 * 2 * math.pi * (frames - 1) / frames, rel=1e-4)
    before = np.unwrap(np.arctan2(*expected[[1, 0], :, 0, changed[0]].double().numpy()))
    assert before[-1] > 2 * math.pi


def test_interpolation_puts_every_other_frame_where_native_ones_are(published):
    stock, axis, ours = published
    tables = by_frame(ours(RopePolicy(*FAR))(latents(32)), 32)
    expected = by_frame(stock(latents(32)), 32)
    assert torch.equal(tables[:, 0::2], expected[:, :16])
    assert torch.equal(tables[..., axis.dim :], expected[..., axis.dim :])  # space stays


def test_mochi_interpolates_time_alone():
    """Every pair's angle is a sum over time, height and width, of frequencies learned a head."""
    mochi = FAMILIES["mochi"]
    transformer = tiny.load_transformer(mochi)
    mochi.rope.apply(transformer, RopePolicy("interpolate", 2, 5))
    learned = transformer.pos_frequencies.detach()
    cos, sin = transformer.rope(learned, 5, 2, 3, dtype=torch.float32)
    scale = math.sqrt(192 * 192 / 6)
    for token, (t, y, x) in enumerate(np.ndindex(5, 2, 3)):
        place = (t * 2 / 5, (y + 0.5 - 1) * scale, (x + 0.5 - 1.5) * scale)
        angle = sum(p * f for p, f in zip(place, learned, strict=True))
        torch.testing.assert_close(cos[token], angle.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(sin[token], angle.sin(), atol=1e-4, rtol=0)


# Models


def with_rope(family, policy, dtype=torch.float32):
    transformer = tiny.load_transformer(family, dtype)
    family.rope.apply(transformer, policy)
    return transformer


def first_queries_and_keys(transformer, inputs, monkeypatch):
    """Return what enters the first layer's attention, video alone: `[2, frames, tokens, H, D]`."""
    attention, seen = installed_attention(transformer), []
    compute = attention.attention

    def recording(layer_index, q, k, v):
        seen.append(torch.stack([q[0], k[0]]))
        return compute(layer_index, q, k, v)

    monkeypatch.setattr(attention, "attention", recording)
    with torch.no_grad():
        transformer(**inputs)
    grid = attention.current.grid
    return seen[0][:, : grid.video].unflatten(1, (grid.frames, -1))


def test_interpolated_frames_attend_as_native_ones_at_half_the_distance(family, monkeypatch):
    """The first layer's queries and keys depend on a token's content and position alone."""
    long = make_inputs(family, frames=12)
    short = long | {"hidden_states": long["hidden_states"][:, :, 0::2]}
    found = {}
    for name, policy, inputs in (
        ("interpolated", RopePolicy(*FAR), long),
        ("native", NATIVE, long),
        ("expected", NATIVE, short),
    ):
        transformer = with_rope(family, policy)
        family.install(transformer, SparseAttention(Dense()))
        found[name] = first_queries_and_keys(transformer, inputs, monkeypatch)
    expected = found["expected"]
    torch.testing.assert_close(found["interpolated"][:, 0::2], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["native"][:, 0::2], expected, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_of_one_is_native_to_the_bit(family, dtype):
    inputs = make_inputs(family, dtype=dtype)
    with torch.no_grad():
        expected = tiny.load_transformer(family, dtype)(**inputs).sample
        assert torch.equal(
            with_rope(family, RopePolicy("interpolate", 9, 9), dtype)(**inputs).sample, expected
        )
        far = with_rope(family, RopePolicy(*FAR), dtype)(**inputs).sample
    assert not torch.allclose(far, expected, atol=1e-2)


def test_native_puts_the_stock_module_back(family):
    transformer = tiny.load_transformer(family)
    stock, keys = transformer.rope, transformer.state_dict().keys()
    assert installed_rope(transformer) == NATIVE
    for policy in (RopePolicy(*FAR), RopePolicy("interpolate", 4, 5)):
        family.rope.apply(transformer, policy)
        assert installed_rope(transformer) == policy and transformer.rope.stock is stock
        assert transformer.state_dict().keys() == keys
    family.install(transformer, SparseAttention(Dense()))  # changes nothing of it
    assert installed_rope(transformer) == policy
    family.rope.apply(transformer, NATIVE)
    assert transformer.rope is stock


# Settings


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rope.polcy=native"], r"rope.polcy is not a setting. Did you mean rope.policy\?"),
        (["rope.policy=yarn"], "rope.policy=yarn must be one of native, riflex, interpolate"),
        (["rope.k=2"], "rope.k=2 applies to rope.policy=riflex only, not to native"),
        (["rope.policy=riflex", "rope.k=0"], "rope.k=0 must be positive"),
        (["rope.policy=riflex", "rope.k=x"], "rope.k=x must be a whole number, or null"),
    ],
)
def test_settings_that_cannot_be_meant(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(["recipe=tiny_wan", *arguments])


@pytest.fixture
def job(cache):
    """A job of a family's tiny model, by arguments beside those of a short run."""

    def make(name, *arguments):
        base = [a for a in arguments_of(name, "", cache, "run") if not a.startswith("data.")]
        given = {a.partition("=")[0]: a for a in [*base, *arguments]}
        return Job.from_config(load(list(given.values())))

    return make


def test_a_job_settles_its_policy_from_its_lengths(job):
    assert job("wan").rope == RopePolicy("native", 9, 17)
    riflex = job("wan", "rope.policy=riflex")
    assert riflex.rope == RopePolicy("riflex", 9, 17, k=2) and riflex.config.rope.k == 2
    assert job("hunyuan", "rope.policy=interpolate").rope == RopePolicy("interpolate", 3, 6)
    assert job("mochi", "rope.policy=interpolate").rope == RopePolicy("interpolate", 2, 4)
    with pytest.raises(ConfigError, match="rope.k=5: the model has 4 temporal frequencies"):
        job("wan", "rope.policy=riflex", "rope.k=5")
    with pytest.raises(ValueError, match="has learned its frequencies.*interpolate or native"):
        job("mochi", "rope.policy=riflex")


def test_the_entry_of_a_native_adapter_stays_readable_for_older_versions(job):
    assert job("wan").adapter_entry()["version"] == 1
    assert job("wan", "rope.policy=interpolate").adapter_entry()["version"] == 2
    assert RopePolicy.recorded({}) == RopePolicy.recorded({"rope": "native"}) == NATIVE


# Past the table


def test_interpolated_positions_stay_inside_wan_s_table(job):
    long = ["extend.factor=null", "frames=1029", "height=16", "width=16"]
    for policy in ("native", "riflex"):
        with pytest.raises(
            ConfigError, match=f"ends at 1024: at most 1021 frames under rope.policy={policy}"
        ):
            job("wan", *long, f"rope.policy={policy}")
    assert job("wan", *long, "rope.policy=interpolate").grid(1029).frames == 1029
    geometry = WanGeometry("wan", 4, 8, (1, 2, 2), 16, 30, 12, 128, max_positions=1024)
    assert RopePolicy("interpolate", 21, 41).most_positions(1024) == 1998  # 7989 frames
    half = RopePolicy("interpolate", 21, 42)
    assert half.most_positions(1024) == 2047  # the last position is 1023
    geometry.check_frames(4 * 2046 + 1, half)
    with pytest.raises(ConfigError, match="2048 latent frames.*at most 8185 frames"):
        geometry.check_frames(4 * 2047 + 1, half)
    with pytest.raises(ConfigError, match="validate.frames: .*ends at 1024"):
        job("wan", "rope.policy=interpolate", "extend.factor=1", "validate.frames=1029")


def test_past_the_table_the_stock_module_fails_and_ours_goes_on():
    stock = tiny.load_transformer(WAN).rope
    with pytest.raises(RuntimeError):
        stock(latents(1025))
    transformer = with_rope(WAN, RopePolicy("interpolate", 512, 1024))
    tables = transformer.rope(latents(2047))
    assert [table.shape for table in tables] == [(1, 2047 * 6, 1, 16)] * 2
    last = by_frame(tables, 2047)[:, -1]
    assert torch.equal(last, by_frame(stock(latents(1024)), 1024)[:, -1])


# Runs


@pytest.mark.parametrize(
    "name, settings",
    [
        ("wan", ["rope.policy=riflex", "rope.k=1"]),
        ("hunyuan", ["rope.policy=interpolate"]),
        ("mochi", ["rope.policy=interpolate"]),
    ],
)
def test_an_adapter_comes_back_with_its_rope(name, settings, videos, cache, tmp_path, caplog):
    """Through sampling in all its ways; without it the model is another, which the log says."""
    family, arguments = FAMILIES[name], arguments_of(name, videos, cache, tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="longreel"):
        trainer = train(arguments, "train.steps=1", *settings)
    note = f"Stock pipelines apply native RoPE, but this adapter was trained with {settings[0]}"
    assert any(note in line for line in caplog.messages)
    assert any(line.startswith(f"RoPE: {trainer.job.rope.policy}") for line in caplog.messages)

    policy, entry = trainer.job.rope, lora.read_entry(trainer.run_dir)
    assert entry["rope"] == dataclasses.asdict(policy) and RopePolicy.recorded(entry) == policy
    assert installed_rope(trainer.learner.transformer) == policy
    frames = 2 * policy.target
    inputs = make_inputs(family, frames=frames, height=8, width=8)
    trainer.learner.attention.dense_layers = frozenset(range(9))
    trainer.learner.transformer.eval()
    with torch.no_grad():
        expected = trainer.learner.transformer(**inputs).sample
        own = tiny.load_pipeline(family)
        own.load_lora_weights(trainer.run_dir)
        assert not torch.allclose(own.transformer(**inputs).sample, expected, atol=1e-3)
        apply_rope(own, entry)
        assert torch.equal(own.transformer(**inputs).sample, expected)
        dense, sparse = (
            load_pipeline(trainer.run_dir, device="cpu", cache_dir=cache, text=False, sparse=sparse)
            for sparse in (False, True)
        )
        installed_attention(sparse.transformer).dense_layers = frozenset(range(9))
        for pipe in (dense, sparse):
            assert torch.equal(pipe.transformer(**inputs).sample, expected)

    with pytest.raises(ConfigError, match=rf"other settings \(.*rope.policy: {policy.policy} -> "):
        train(arguments, "train.steps=1")


def test_samples_and_comfyui(videos, cache, tmp_path, caplog):
    """A longer sample than the training, under the recorded policy; ComfyUI knows none."""
    run = tmp_path / "run"
    arguments = [*arguments_of("wan", videos, cache, run), "rope.policy=interpolate"]
    trainer = train(arguments, "train.steps=1", "validate.prompts=a wave", "validate.frames=21")
    assert trainer.validator.samples(1)[0].is_file()
    out = tmp_path / "long.mp4"
    sample = ["sample", f"lora={run}", "prompt=waves", f"out={out}", "steps=2", f"cache={cache}"]
    main([*sample, "frames=21"])
    assert out.is_file()
    with pytest.raises(SystemExit, match="under rope.policy=interpolate"):
        main([*sample, "frames=2001"])
    main(["export", f"lora={run}", f"cache={cache}"])
    assert "ComfyUI applies native RoPE" in caplog.text
