"""The Wan family against the stock diffusers model and pipeline."""

import filecmp
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny import WAN, AllBlocks, wan_folder, wan_inputs, wan_pipeline, wan_text, wan_transformer

from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Dense, Radial
from longreel.trainer.config import ConfigError
from longreel.trainer.families import installed_attention
from longreel.trainer.flow import add_noise
from longreel.trainer.lora import attach


def sparse_transformer(pattern, dtype=torch.float32, block=16, **options):
    transformer = wan_transformer(dtype)
    WAN.install(transformer, SparseAttention(pattern, block=block, **options))
    return transformer


def forward_backward(transformer, inputs):
    """Output and the gradients of whatever is trainable, for one fixed direction."""
    out = transformer(**inputs, return_dict=False)[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    (out * direction).sum().backward()
    grads = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    return out.detach(), grads


# Attention


@pytest.mark.parametrize("trained", ["base", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_bit_equal_to_the_stock_model(trained, dtype):
    stock, ours = wan_transformer(dtype), sparse_transformer(Dense(), dtype)
    if trained == "lora":
        for transformer in (stock, ours):
            attach(transformer, WAN, rank=4, seed=1)
    inputs = wan_inputs(batch=2, dtype=dtype)
    expected, expected_grads = forward_backward(stock, inputs)
    out, grads = forward_backward(ours, inputs)
    assert torch.equal(out, expected)
    assert grads.keys() == expected_grads.keys() and grads
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())
    assert any(grad.any() for grad in grads.values())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_all_blocks_are_within_the_stock_model_s_own_error():
    inputs = wan_inputs()
    double = {name: tensor.double() for name, tensor in inputs.items()}
    exact, exact_grads = forward_backward(wan_transformer().double(), double)
    stock, stock_grads = forward_backward(wan_transformer(), inputs)
    out, grads = forward_backward(sparse_transformer(AllBlocks(), backend="reference"), inputs)
    with torch.no_grad():  # FlexAttention has no backward on a CPU
        flex = sparse_transformer(AllBlocks(), backend="flex")(**inputs).sample

    def error(got, exact):
        return ((got - exact).norm() / exact.norm()).item()

    for ours in (out, flex):
        assert error(ours, exact) <= 2 * error(stock, exact)
    for name, grad in exact_grads.items():
        assert error(grads[name], grad) <= 3 * error(stock_grads[name], grad), name


def test_a_sparse_pattern_changes_the_result():
    inputs = wan_inputs(frames=25)
    stock = wan_transformer()(**inputs).sample
    assert not torch.allclose(sparse_transformer(Radial())(**inputs).sample, stock, atol=1e-3)
    layers = sparse_transformer(Radial(), dense_layers=3)
    assert torch.equal(layers(**inputs).sample, stock)


def test_fused_projections_are_followed():
    inputs = wan_inputs()
    stock, ours = wan_transformer(), sparse_transformer(Dense())
    for transformer in (stock, ours):
        transformer.fuse_qkv_projections()
    assert torch.equal(ours(**inputs).sample, stock(**inputs).sample)


def test_layers_are_numbered_in_block_order_and_text_attention_stays_stock(monkeypatch):
    transformer = sparse_transformer(Dense())
    attention, seen = installed_attention(transformer), []
    compute = attention.attention

    def recording(layer_index, q, k, v):
        seen.append((layer_index, tuple(q.shape)))
        return compute(layer_index, q, k, v)

    monkeypatch.setattr(attention, "attention", recording)
    transformer(**wan_inputs(batch=2))
    assert seen == [(layer, (2, 9 * 3 * 5, 2, 16)) for layer in range(3)]
    assert attention.current.grid == TokenGrid(9, 3, 5)
    names = {type(block.attn2.processor).__name__ for block in transformer.blocks}
    assert names == {"WanAttnProcessor"}
    processors = {id(block.attn1.processor) for block in transformer.blocks}
    assert len(processors) == 3


def test_installing_again_replaces_hook_and_attention():
    transformer = sparse_transformer(Radial())
    WAN.install(transformer, SparseAttention(Dense()))
    assert len(transformer._forward_pre_hooks) == 1
    assert installed_attention(transformer).pattern == Dense()
    inputs = wan_inputs(frames=25)
    assert torch.equal(transformer(**inputs).sample, wan_transformer()(**inputs).sample)
    assert installed_attention(wan_transformer()) is None


def test_positional_arguments_reach_the_plan():
    transformer = sparse_transformer(Dense())
    attention = installed_attention(transformer)
    attention.schedule, attention.dense_steps = (lambda timestep: int(timestep[0] < 500)), 1
    hidden, timestep, text = wan_inputs().values()
    for value, dense in ((900.0, True), (100.0, False)):
        transformer(hidden, torch.full_like(timestep, value), text)
        assert attention.current.dense is dense


def test_two_forwards_before_one_backward_with_checkpointing():
    long, short = wan_inputs(frames=13), wan_inputs(frames=9, height=4, seed=1)
    plain, checkpointed = sparse_transformer(Radial()), sparse_transformer(Radial())
    expected = {}
    for inputs in (long, short):
        plain.zero_grad()
        for name, grad in forward_backward(plain, inputs)[1].items():
            expected[name] = expected.get(name, 0) + grad.clone()
    attention = installed_attention(checkpointed)
    checkpointed.enable_gradient_checkpointing(attention.checkpoint)
    checkpointed.train()
    total = 0
    for inputs in (long, short):
        out = checkpointed(**inputs).sample
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        total = total + (out * direction).sum()
    total.backward()
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# Conventions, against the pipeline's own loop


def oracle(transformer, velocity):
    """Let a transformer answer `velocity` whatever it is asked; returns what it is asked."""
    calls = []

    def answer(module, args, kwargs, output):
        calls.append(kwargs)
        return (velocity,)

    transformer.register_forward_hook(answer, with_kwargs=True)
    return calls


def moving_squares(frames=9, height=48, width=64):
    pixels = torch.full((frames, height, width, 3), 40, dtype=torch.uint8)
    for i in range(frames):
        pixels[i, 8 + i : 24 + i, 4 * i : 4 * i + 16] = torch.tensor([250, 60 + 9 * i, 90])
    return pixels


def test_true_velocity_takes_the_pipeline_from_noise_to_the_video():
    pipe = wan_pipeline()
    pixels = moving_squares()
    clean = WAN.encode_video(pipe, pixels)[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    calls = oracle(pipe.transformer, WAN.target(clean, noise))
    arguments = dict(
        WAN.pipeline_text(wan_text(), None),
        latents=noise,
        height=pixels.shape[1],
        width=pixels.shape[2],
        num_inference_steps=4,
        guidance_scale=1.0,
    )
    latents = pipe(**arguments, output_type="latent").frames
    torch.testing.assert_close(latents, clean, atol=1e-4, rtol=0)
    assert len(calls) == 4
    for call in calls:
        # The pipeline truncates its timesteps to integers: sigma is right to 1e-3.
        noisy = add_noise(clean, noise, call["timestep"] / WAN.timestep(torch.ones(1)))
        torch.testing.assert_close(call["hidden_states"], noisy, atol=8e-3, rtol=0)

    frames = torch.as_tensor(pipe(**arguments, output_type="np").frames[0])
    with torch.no_grad():
        scaled = pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1
        decoded = pipe.vae.decode(pipe.vae.encode(scaled).latent_dist.mode()).sample[0]
    torch.testing.assert_close(frames, decoded.permute(1, 2, 3, 0) / 2 + 0.5, atol=1e-3, rtol=0)


def test_latents_are_normalised_and_repeatable():
    pipe = wan_pipeline()
    latents = WAN.encode_video(pipe, moving_squares(frames=13))
    assert latents.shape == (4, 13, 6, 8) and latents.dtype == torch.float32
    assert 0.3 < latents.std() < 3 and latents.mean().abs() < 1
    assert torch.equal(latents, WAN.encode_video(pipe, moving_squares(frames=13)))


@pytest.mark.parametrize("caption", ["", "two  cats &amp; a dog", "x" * 2000])
def test_cached_text_is_bit_equal_to_what_the_pipeline_feeds(caption):
    pipe = wan_pipeline(vae=True)
    calls = oracle(pipe.transformer, torch.zeros(1, 4, 1, 2, 2))
    pipe(
        caption,
        negative_prompt="blurry",
        height=16,
        width=16,
        latents=torch.zeros(1, 4, 1, 2, 2),
        num_inference_steps=1,
        output_type="latent",
    )
    texts = [WAN.encode_text(pipe, text) for text in (caption, "blurry")]
    batch = WAN.collate_text(texts)["encoder_hidden_states"]
    assert batch.shape[1] == 512 and not batch.requires_grad
    assert texts[0]["prompt_embeds"].shape[0] == min(
        len(caption.replace("&amp;", "&")) + 1, 512
    ) - (caption.count("  "))
    for row, call in zip(batch, calls, strict=True):
        assert torch.equal(row, call["encoder_hidden_states"][0])
    kwargs = WAN.pipeline_text(*texts)
    assert torch.equal(
        torch.cat([kwargs["prompt_embeds"], kwargs["negative_prompt_embeds"]]), batch
    )


def test_padding_is_attended():
    """Why text is padded again before the model, and not left short."""
    inputs = wan_inputs()
    short = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"][:, :5])
    transformer = wan_transformer()
    assert not torch.allclose(transformer(**inputs).sample, transformer(**short).sample, atol=1e-3)


def test_parts_that_are_not_asked_for_are_not_read(tmp_path):
    folder = shutil.copytree(wan_folder(), tmp_path / "model")
    for part in ("text_encoder", "tokenizer", "vae", "transformer"):
        shutil.rmtree(folder / part)
    pipe = WAN.load_pipeline(str(folder), None, text=False, vae=False, dtype=torch.float32)
    assert pipe.text_encoder is pipe.tokenizer is pipe.vae is pipe.transformer is None


def test_bf16_base_keeps_the_vae_and_the_prediction_in_fp32():
    transformer = wan_transformer(torch.bfloat16)
    pipe = WAN.load_pipeline(wan_folder(), None, transformer=transformer, dtype=torch.bfloat16)
    assert pipe.vae.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    noisy, sigma = wan_inputs()["hidden_states"], torch.tensor([0.5])
    prediction = WAN.predict(transformer, noisy, sigma, WAN.collate_text([wan_text()]))
    assert prediction.dtype == torch.float32 and prediction.shape == noisy.shape


# Files and sizes


def published(tmp_path, index=(), transformer=(), vae=()):
    """JSON files like those of Wan2.1-T2V-1.3B-Diffusers, with changes."""
    files = {
        "model_index.json": {"_class_name": "WanPipeline", **dict(index)},
        "transformer/config.json": {
            "patch_size": [1, 2, 2],
            "in_channels": 16,
            "num_layers": 30,
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "image_dim": None,
            "rope_max_seq_len": 1024,
            **dict(transformer),
        },
        "vae/config.json": {"z_dim": 16, "temperal_downsample": [False, True, True], **dict(vae)},
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return str(tmp_path)


def test_published_sizes(tmp_path):
    geometry = WAN.geometry(published(tmp_path))
    assert (geometry.temporal, geometry.spatial, geometry.patch) == (4, 8, (1, 2, 2))
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (30, 12, 128)
    assert [WAN.extended_frames(WAN.native_frames, n, geometry) for n in (2, 4)] == [161, 321]
    shape = WAN.latent_shape(161, 480, 832, geometry)
    assert shape == (16, 41, 60, 104)
    assert WAN.grid(shape, geometry.patch) == TokenGrid(41, 30, 52)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"index": {"transformer_2": ["diffusers", "WanTransformer3DModel"]}}, "two experts"),
        ({"index": {"boundary_ratio": 0.875}}, "two experts"),
        ({"index": {"expand_timesteps": True}}, "timestep per token"),
        ({"transformer": {"in_channels": 36, "image_dim": 1280}}, "image-to-video"),
        ({"index": {"_class_name": "WanImageToVideoPipeline"}}, "WanImageToVideoPipeline"),
    ],
)
def test_other_wan_models_are_refused_by_name(tmp_path, changes, name):
    with pytest.raises(ConfigError, match=name) as error:
        WAN.geometry(published(tmp_path, **changes))
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in str(error.value)


@pytest.mark.parametrize(
    "frames, message",
    [
        (80, "the nearest are 77 and 81"),
        (0, "the nearest are 1 and 5"),
        (4097, "1025 latent frames.* RoPE table ends at 1024: at most 4093 frames"),
    ],
)
def test_frames_that_do_not_fit(tmp_path, frames, message):
    geometry = WAN.geometry(published(tmp_path))
    with pytest.raises(ConfigError, match=f"frames={frames}.*{message}"):
        WAN.check_frames(frames, geometry)
    WAN.check_frames(4093, geometry)


def test_tiny_frames_follow_the_vae_s_chunks_of_four():
    """Without temporal compression every length has latents, but the VAE still drops a rest."""
    geometry = WAN.geometry(wan_folder())
    assert WAN.latent_shape(49, 160, 192, geometry) == (4, 49, 20, 24)
    with pytest.raises(ConfigError, match="49 and 53"):
        WAN.check_frames(50, geometry)
    dropped = WAN.encode_video(wan_pipeline(), moving_squares(frames=10))
    assert dropped.shape[1] == 9


def test_pixels_that_do_not_make_patches(tmp_path):
    geometry = WAN.geometry(published(tmp_path))
    with pytest.raises(ConfigError, match="height=100 must be a multiple of 16.*96 and 112"):
        WAN.latent_shape(81, 100, 192, geometry)


@pytest.mark.parametrize("path", ["/nowhere/wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
def test_missing_files_say_what_to_fetch_and_how(monkeypatch, path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ConfigError) as error:
        WAN.geometry(path)
    message = str(error.value)
    assert f"model.path={path}" in message and "local folder" in message
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in message


def test_missing_weights_say_what_to_fetch(tmp_path):
    folder = shutil.copytree(wan_folder(), tmp_path / "model")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="hf download"):
        WAN.load_transformer(str(folder), None, torch.float32)


def test_tiny_is_built_once_and_always_the_same(tmp_path):
    state = torch.random.get_rng_state()
    first = Path(WAN.resolve("tiny", tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    stamps = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert WAN.resolve("tiny", tmp_path) == str(first)
    assert stamps == {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert list(tmp_path.iterdir()) == [first]
    files = [str(file.relative_to(first)) for file in stamps if file.is_file()]
    assert len(files) >= 8
    assert filecmp.cmpfiles(first, wan_folder(), files, shallow=False)[0] == files


def test_resolve_leaves_other_paths_alone(tmp_path):
    assert WAN.resolve("some/repository", tmp_path) == "some/repository"
    assert WAN.resolve(None, tmp_path) == WAN.default_path
    assert not list(tmp_path.iterdir())
