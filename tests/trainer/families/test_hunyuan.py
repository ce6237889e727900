"""The HunyuanVideo family against the stock diffusers model, pipeline and VAE."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Dense, Radial
from longreel.trainer.adapter.lora import attach
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES, installed_attention
from longreel.trainer.families.loader import ModelConfigs

HUNYUAN = FAMILIES["hunyuan"]
DTYPES = [torch.float32, torch.bfloat16]


def with_attention(pattern, dtype=torch.float32, **options):
    transformer = tiny.load_transformer(HUNYUAN, dtype)
    HUNYUAN.install(transformer, SparseAttention(pattern, block=16, **options))
    return transformer


@pytest.fixture(scope="module")
def pipe():
    return tiny.load_pipeline(HUNYUAN)


def record(transformer):
    """Keyword arguments of every forward from now on, and a handle that ends it."""
    calls = []

    def note(module, args, kwargs):
        calls.append(kwargs)

    return calls, transformer.register_forward_pre_hook(note, with_kwargs=True)


def as_double(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def sample(pipe, *args, **kwargs):
    """Latents of a small video, and the arguments of every forward that the pipeline made."""
    calls, handle = record(pipe.transformer)
    noise = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    defaults = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}
    try:
        return pipe(*args, latents=noise, **defaults | kwargs).frames, calls
    finally:
        handle.remove()


# Attention


@pytest.mark.parametrize("trained", ["base", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_is_bit_equal_to_the_stock_model(trained, dtype):
    stock, ours = tiny.load_transformer(HUNYUAN, dtype), with_attention(Dense(), dtype)
    if trained == "lora":
        for transformer in (stock, ours):
            attach(transformer, HUNYUAN, rank=4, seed=1, targets="attention+text")
            tiny.randomise((n, p) for n, p in transformer.named_parameters() if p.requires_grad)
    inputs = tiny.make_inputs(HUNYUAN, texts=(5, 5), dtype=dtype)
    expected, expected_grads = tiny.forward_backward(stock, inputs)
    out, grads = tiny.forward_backward(ours, inputs)
    assert torch.equal(out, expected)
    assert grads.keys() == expected_grads.keys() and grads
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())
    assert all(grad.any() for name, grad in grads.items() if "attn.to_" in name)


def test_text_of_two_lengths_is_within_the_stock_model_s_own_error():
    """The stock model masks the padding, we leave it out: the same sums in another order."""
    inputs = tiny.make_inputs(HUNYUAN, texts=(5, 9))
    exact, exact_grads = tiny.forward_backward(
        tiny.load_transformer(HUNYUAN).double(), as_double(inputs)
    )
    stock, stock_grads = tiny.forward_backward(tiny.load_transformer(HUNYUAN), inputs)
    ours, grads = tiny.forward_backward(with_attention(Dense()), inputs)
    assert (ours - exact).norm() <= 2 * (stock - exact).norm()
    scale = max(grad.norm() for grad in exact_grads.values())
    for name, exact_grad in exact_grads.items():
        allowed = 2 * (stock_grads[name] - exact_grad).norm() + 1e-7 * scale
        assert (grads[name] - exact_grad).norm() <= allowed, name


@pytest.mark.parametrize("pattern", [Dense(), Radial()])
def test_a_batch_of_two_text_lengths_equals_each_alone(pattern):
    """Blocks of a sparse layer, too, hold padding that nothing attends to."""
    transformer = with_attention(pattern, backend="reference", dense_layers=1)
    inputs = tiny.make_inputs(HUNYUAN, texts=(5, 37))
    with torch.no_grad():
        together = transformer(**inputs).sample
        assert installed_attention(transformer).current.valid == (135 + 5, 135 + 37)
        for index, length in enumerate((5, 37)):
            alone = {name: x[index : index + 1] for name, x in inputs.items()}
            for name in ("encoder_hidden_states", "encoder_attention_mask"):
                alone[name] = alone[name][:, :length]
            out = transformer(**alone).sample
            torch.testing.assert_close(together[index : index + 1], out, atol=2e-6, rtol=0)


def test_padding_of_text_may_be_trimmed():
    """The pipeline feeds 256 tokens of which most are masked, we those that count: equal but for
    the order of summation."""
    trimmed = tiny.make_inputs(HUNYUAN, texts=(11,))
    padded = tiny.make_inputs(HUNYUAN, texts=(256,), seed=0)
    padded["pooled_projections"] = trimmed["pooled_projections"]
    padded["encoder_hidden_states"][:, :11] = trimmed["encoder_hidden_states"]
    padded["encoder_attention_mask"][:, 11:] = False
    with torch.no_grad():
        exact = tiny.load_transformer(HUNYUAN).double()(**as_double(padded)).sample
        stock = tiny.load_transformer(HUNYUAN)(**padded).sample
        ours = with_attention(Dense())(**trimmed).sample
    assert (ours - exact).norm() <= 2 * (stock - exact).norm()
    torch.testing.assert_close(ours, stock, atol=2e-6, rtol=0)


def test_the_token_refiner_is_left_alone():
    """It lists its attention among the model's processors, and its layers have the same names."""
    stock, ours = tiny.load_transformer(HUNYUAN), with_attention(Dense())
    for name, processor in stock.attn_processors.items():
        refiner = "token_refiner" in name
        assert (type(ours.attn_processors[name]) is type(processor)) is refiner, name
    assert len([name for name in stock.attn_processors if "token_refiner" in name]) == 1
    assert len({id(processor) for processor in ours.attn_processors.values()}) == 5


def targeted(targets):
    pattern = re.compile(HUNYUAN.layers.target_pattern(targets))
    transformer = HUNYUAN.loader.blank_transformer(tiny.folder(HUNYUAN), None)
    return {name for name, _ in transformer.named_modules() if pattern.fullmatch(name)}


def test_lora_targets():
    attention = targeted(None)
    dual = {f"transformer_blocks.{i}.attn" for i in range(2)}
    single = {f"single_transformer_blocks.{i}" for i in range(2)}
    assert attention == {f"{x}.{n}" for x in dual for n in ("to_q", "to_k", "to_v", "to_out.0")} | {
        f"{x}.attn.{n}" for x in single for n in ("to_q", "to_k", "to_v")
    }
    assert attention == targeted("attention")
    assert targeted("attention+text") - attention == {
        f"{x}.{n}" for x in dual for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    # The single blocks' attention output is part of a projection that the MLP shares.
    assert targeted("attention+fused") - attention == {f"{x}.proj_out" for x in single}


def test_the_fused_projection_trains():
    transformer = tiny.load_transformer(HUNYUAN)
    attach(transformer, HUNYUAN, rank=4, seed=1, targets="attention+fused")
    _, grads = tiny.forward_backward(transformer, tiny.make_inputs(HUNYUAN))
    fused = [name for name in grads if "proj_out" in name]
    assert len(fused) == 4 and all(grads[name].any() for name in fused if "lora_B" in name)


def test_original_layers_are_those_that_diffusers_converts():
    """Its reader of the published checkpoint, run on one whose layers have a number each."""
    from diffusers.loaders.single_file_utils import (
        convert_hunyuan_video_transformer_to_diffusers as convert,
    )

    width = 3072  # which the converter takes for granted
    transformer = HUNYUAN.loader.blank_transformer(tiny.folder(HUNYUAN), None)
    layers = {name for name, _ in transformer.named_modules()}
    for number, (original, parts) in enumerate(HUNYUAN.layers.original.items()):
        rows = width * len(parts)
        weight = number + torch.arange(rows, dtype=torch.float64)[:, None]
        checkpoint = convert({f"{original.format(1)}.weight": weight})
        stacked = [checkpoint.pop(f"{part.format(1)}.weight") for part in parts]
        assert not checkpoint and torch.equal(torch.cat(stacked), weight), original
        assert {part.format(1) for part in parts} <= layers
    covered = {part for parts in HUNYUAN.layers.original.values() for part in parts}
    for targets in HUNYUAN.layers.lora_targets:
        for name in targeted(targets):
            assert re.sub(r"\.\d+\.", ".{}.", name, count=1) in covered


# Text


def test_a_bytelevel_tokenizer_is_read_right_under_transformers_5(pipe):
    """The pipeline's own loading takes the class that the index names, and gets other ids."""
    own = HUNYUAN.names.pipeline_class.from_pretrained(
        tiny.folder(HUNYUAN), transformer=None, vae=None, text_encoder=None, text_encoder_2=None
    )
    index = json.loads(Path(tiny.folder(HUNYUAN), "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "LlamaTokenizerFast"]
    prefix, crop = prompt_template()
    words = "a rabbit in a green meadow"
    right, wrong = (x.tokenizer(words).input_ids for x in (pipe, own))
    assert pipe.tokenizer.decode(right, skip_special_tokens=True) == words
    assert right != wrong
    lengths = [len(x.tokenizer(prefix).input_ids) for x in (pipe, own)]
    assert lengths[0] == crop and lengths[1] > crop
    assert pipe.tokenizer.padding_side == "right"


def prompt_template():
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video

    template = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    return template["template"].partition("{}")[0], template["crop_start"]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    from transformers import LlamaTokenizerFast

    folder = shutil.copytree(tiny.folder(HUNYUAN), tmp_path / "model")
    wrong = LlamaTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
    wrong.save_pretrained(folder / "tokenizer")
    with pytest.raises(ConfigError, match="Metaspace in place of the ByteLevel.*hf download"):
        HUNYUAN.loader.load_pipeline(str(folder), None, vae=False, dtype=torch.float32)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ConfigError, match="tokenizer.json cannot be read"):
        HUNYUAN.loader.load_pipeline(str(folder), None, vae=False, dtype=torch.float32)


@pytest.mark.parametrize("caption", ["", "two {} cats\n& a dog", "a long shot of the sea " * 30])
def test_cached_text_is_bit_equal_to_what_the_pipeline_feeds(pipe, caption):
    _, calls = sample(pipe, caption)
    text = HUNYUAN.text.encode(pipe, caption)
    fed = calls[0]
    assert fed["encoder_hidden_states"].shape[1] == 256
    mask = fed["encoder_attention_mask"][0].bool()
    assert torch.equal(text["prompt_embeds"], fed["encoder_hidden_states"][0, mask])
    assert torch.equal(text["pooled_prompt_embeds"], fed["pooled_projections"][0])
    assert not text["prompt_embeds"].requires_grad
    ids = pipe.tokenizer(caption + "<|eot_id|>").input_ids[1:]
    assert len(text["prompt_embeds"]) == min(len(ids), 256)
    batch = HUNYUAN.text.collate([text])
    assert batch["encoder_attention_mask"].all() and batch["encoder_attention_mask"].any()
    assert torch.equal(batch["pooled_projections"], fed["pooled_projections"])


def test_captions_reach_the_model(pipe):
    """All captions would begin alike with a template longer than the pipeline cuts off."""
    one, other = (HUNYUAN.text.encode(pipe, text) for text in ("a cat", "the sea"))
    assert not torch.allclose(one["prompt_embeds"][0], other["prompt_embeds"][0], atol=1e-3)
    assert not torch.allclose(one["pooled_prompt_embeds"], other["pooled_prompt_embeds"], atol=1e-3)


def test_an_empty_prompt_has_a_token(pipe):
    assert HUNYUAN.text.encode(pipe, "")["prompt_embeds"].shape == (1, 32)


def test_text_without_a_token_would_be_nan_and_is_refused(pipe, monkeypatch):
    inputs = tiny.make_inputs(HUNYUAN, texts=(5,))
    inputs["encoder_attention_mask"] = torch.zeros(1, 5, dtype=torch.bool)
    assert tiny.load_transformer(HUNYUAN)(**inputs).sample.isnan().any()
    embeds, pooled, mask = pipe.encode_prompt("")
    monkeypatch.setattr(pipe, "encode_prompt", lambda _: (embeds, pooled, torch.zeros_like(mask)))
    with pytest.raises(ConfigError, match="captions do not reach the model.*hf download"):
        HUNYUAN.text.encode(pipe, "a cat")


def test_prompt_2_is_ignored_by_the_pipeline(pipe):
    """So one caption decides both encoders' text, and the cache misses nothing."""
    with torch.no_grad():
        alone, both = pipe.encode_prompt("a cat"), pipe.encode_prompt("a cat", prompt_2="the sea")
    assert all(torch.equal(x, y) for x, y in zip(alone, both, strict=True))


def test_sampling_from_the_cache_equals_sampling_from_the_prompt(pipe):
    prompt = "a rabbit in a green meadow"
    expected, _ = sample(pipe, prompt, guidance_scale=6.0)
    inputs = HUNYUAN.text.pipeline_inputs(HUNYUAN.text.encode(pipe, prompt), None, 6.0)
    latents, calls = sample(pipe, **inputs)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    assert len(calls) == 2 and all(call["timestep"].dtype == torch.float32 for call in calls)


# Guidance and timesteps


def test_guidance_is_1_in_training_and_6_when_sampling(pipe):
    geometry = HUNYUAN.read_geometry(tiny.folder(HUNYUAN))
    assert geometry.guidance_embeds and not geometry.uses_negative(6.0)
    assert HUNYUAN.defaults.guidance == 6.0
    _, calls = sample(pipe, **HUNYUAN.text.pipeline_inputs(tiny_text(), None, 6.0))
    assert [call["guidance"].tolist() for call in calls] == [[6000.0]] * 2
    calls, _ = record(transformer := tiny.load_transformer(HUNYUAN))
    noisy = tiny.make_inputs(HUNYUAN)["hidden_states"]
    text = HUNYUAN.text.collate([tiny_text()])
    out = [
        HUNYUAN.noising.predict(transformer, noisy, torch.tensor([0.5]), text, guidance)
        for guidance in (HUNYUAN.defaults.train_guidance, HUNYUAN.defaults.guidance)
    ]
    assert [call["guidance"].tolist() for call in calls] == [[1000.0], [6000.0]]
    assert not torch.allclose(*out, atol=1e-3)


def tiny_text(seed=0):
    return tiny.make_text(HUNYUAN, seed=seed)


def test_timesteps_and_guidance_reach_a_bf16_transformer_in_fp32():
    """bf16 has no 999; the model's sinusoids are of what it is given."""
    transformer = tiny.load_transformer(HUNYUAN, torch.bfloat16)
    calls, handle = record(transformer)
    noisy, sigma = tiny.make_inputs(HUNYUAN)["hidden_states"], torch.tensor([0.999])
    out = HUNYUAN.noising.predict(
        transformer, noisy, sigma, HUNYUAN.text.collate([tiny_text()]), 1.0
    )
    assert out.dtype == torch.float32 and out.shape == noisy.shape
    handle.remove()
    (call,) = calls
    assert call["timestep"].dtype == call["guidance"].dtype == torch.float32
    assert call["timestep"].item() == pytest.approx(999.0)
    assert call["encoder_hidden_states"].dtype == torch.bfloat16
    assert call["encoder_attention_mask"].dtype == torch.bool


def test_the_pipeline_with_a_bf16_transformer_rounds_its_timesteps(steps=50):
    """Its scheduler returns latents in the prediction's dtype, and the pipeline casts the timestep
    to theirs: from the second step on neighbours fall together, so a timestep does not tell the
    step it belongs to. The scheduler's count does."""
    pipe = tiny.load_pipeline(
        HUNYUAN, tiny.load_transformer(HUNYUAN, torch.bfloat16), vae=False, text=False
    )
    counted = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args: counted.append(pipe.scheduler.step_index or 0)
    )
    inputs = HUNYUAN.text.pipeline_inputs(tiny_text(), None, 6.0)
    _, calls = sample(pipe, **inputs, num_inference_steps=steps)
    assert [call["timestep"].dtype for call in calls[:2]] == [torch.float32, torch.bfloat16]
    assert calls[1]["timestep"] == calls[2]["timestep"] == 996
    assert counted == list(range(steps))
    assert {call["guidance"].item() for call in calls} == {6016}  # 6000 in bf16


def test_a_model_without_guidance_embeds_leads_away_from_a_negative_prompt():
    """FastVideo's and other undistilled variants are such: two forwards a step, each with its
    text."""
    pipe = tiny.load_pipeline(HUNYUAN, vae=False, text=False)
    config = dict(pipe.transformer.config, guidance_embeds=False)
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    vae = tiny.load_pipeline(HUNYUAN, text=False).vae
    configs = ModelConfigs("", {}, pipe.transformer.config, vae.config)
    geometry = HUNYUAN.geometry.read(HUNYUAN.names, configs)
    assert geometry.uses_negative(6.0) and not geometry.uses_negative(1.0)
    text, negative = tiny_text(), tiny_text(seed=1)
    latents, calls = sample(pipe, **HUNYUAN.text.pipeline_inputs(text, negative, 6.0))
    assert len(calls) == 4 and latents.isfinite().all()
    for call, expected in zip(calls, [text, negative] * 2, strict=True):
        assert torch.equal(call["encoder_hidden_states"][0], expected["prompt_embeds"])
        assert torch.equal(call["pooled_projections"][0], expected["pooled_prompt_embeds"])


# VAE


def test_the_vae_drops_frames_off_its_grid_so_the_nearest_lengths_are_named(pipe):
    pixels = torch.randint(0, 255, (10, 32, 32, 3), dtype=torch.uint8)
    dropped, kept = (HUNYUAN.vae.encode(pipe.vae, pixels[:n]) for n in (10, 9))
    assert dropped.shape == kept.shape == (4, 3, 4, 4)
    geometry = HUNYUAN.read_geometry(tiny.folder(HUNYUAN))
    with pytest.raises(ConfigError, match="frames=10: hunyuan takes 4k \\+ 1.* 9 and 13"):
        geometry.check_frames(10)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("frames", [1, 4, 5, 7, 11])
def test_decode_chunks_equal_decode(tiled, frames):
    """On either side of the length from which on the VAE tiles over time; 7 leaves no rest."""
    vae = tiny.load_pipeline(HUNYUAN, text=False).vae
    if tiled:
        vae.enable_tiling(32, 32, tile_sample_stride_height=16, tile_sample_stride_width=16)
    latents = torch.randn(1, 4, frames, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        chunks = list(HUNYUAN.vae.decode_chunks(vae, latents))
    assert torch.equal(torch.cat(chunks, dim=2), expected)
    assert max(chunk.shape[2] for chunk in chunks) <= 13


def test_encoding_is_tiled_in_time_and_space():
    """Long clips need it: 17 frames of 256 x 256 at a time; of 32 x 32 here."""
    vae, seen = tiny.load_pipeline(HUNYUAN, text=False).vae, []
    assert (vae.tile_sample_min_num_frames, vae.tile_sample_min_height) == (16, 256)
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    pixels = torch.zeros(21, 32, 48, 3, dtype=torch.uint8)
    assert HUNYUAN.vae.encode(vae, pixels).shape == (4, 6, 4, 6)
    assert max(seen) == (17, 32, 32) and len(seen) == 2 * 2 * 2


def test_latents_have_unit_scale_and_the_pipeline_s_convention(pipe):
    t, y, x = torch.meshgrid(torch.arange(13), torch.arange(64), torch.arange(96), indexing="ij")
    pixels = torch.stack([(x + 4 * t) * 2 % 256, y * 3, (x + y) % 256], dim=-1).byte()
    latents = HUNYUAN.vae.encode(pipe.vae, pixels)
    assert latents.shape == (4, 4, 8, 12) and 0.5 < latents.std() < 2
    assert torch.equal(latents, HUNYUAN.vae.encode(pipe.vae, pixels))
    with torch.no_grad():
        raw = pipe.vae.encode(pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist.mode()
        decoded = pipe.vae.decode(latents[None] / pipe.vae.config.scaling_factor).sample[0]
    torch.testing.assert_close(HUNYUAN.vae.denormalise(pipe.vae, latents[None]), raw)
    frames = torch.stack([torch.as_tensor(x) for x in HUNYUAN.vae.decode(pipe.vae, latents)])
    expected = (decoded.permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    assert (frames / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6


# Sizes


def published(tmp_path, index=(), transformer=(), vae=()):
    """JSON files like those of hunyuanvideo-community/HunyuanVideo, with changes."""
    files = {
        "model_index.json": {"_class_name": "HunyuanVideoPipeline", **dict(index)},
        "transformer/config.json": {
            "patch_size": 2,
            "patch_size_t": 1,
            "in_channels": 16,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "guidance_embeds": True,
            **dict(transformer),
        },
        "vae/config.json": {
            "latent_channels": 16,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
            **dict(vae),
        },
    }
    return tiny.write_model(tmp_path, files)


def test_published_sizes(tmp_path):
    geometry = HUNYUAN.read_geometry(published(tmp_path))
    assert (geometry.temporal, geometry.spatial, geometry.patch) == (4, 8, (1, 2, 2))
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (20 + 40, 24, 128)
    assert geometry.guidance_embeds and geometry.max_positions is None
    assert [geometry.extended_frames(125, n) for n in (1, 2, 4)] == [125, 253, 509]
    shape = geometry.latent_shape(253, 720, 1280)
    assert geometry.grid(shape) == TokenGrid(64, 45, 80)
    assert geometry.latent_shape(509, 720, 1280) == (16, 128, 90, 160)


def test_the_tiny_model_says_what_the_published_one_says():
    path = tiny.folder(HUNYUAN)
    geometry = HUNYUAN.read_geometry(path)
    assert (geometry.temporal, geometry.spatial, geometry.patch) == (4, 8, (1, 2, 2))
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (4, 2, 16)
    assert HUNYUAN.geometry_of(tiny.load_pipeline(HUNYUAN, text=False)) == geometry


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"transformer": {"image_condition_type": "token_replace"}}, "image-to-video"),
        ({"transformer": {"in_channels": 33}}, "image-to-video"),
        ({"index": {"_class_name": "HunyuanVideoImageToVideoPipeline"}}, "ImageToVideoPipeline"),
        ({"index": {"_class_name": "HunyuanVideo15Pipeline"}}, "HunyuanVideo15Pipeline"),
    ],
)
def test_other_hunyuan_models_are_refused_by_name(tmp_path, changes, name):
    with pytest.raises(ConfigError, match=name) as error:
        HUNYUAN.read_geometry(published(tmp_path, **changes))
    assert HUNYUAN.names.repository in str(error.value)
