"""Hold every model family to its contract, against its stock diffusers model and pipeline."""

import filecmp
import functools
import shutil
import weakref
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from runs import arguments_of
from tiny import AllBlocks, forward_backward, make_inputs, make_text, randomise
from torch.nn import Module

from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Dense, Radial
from longreel.trainer.adapter import lora
from longreel.trainer.clips import prepare_data
from longreel.trainer.config.recipe import load
from longreel.trainer.config.values import ConfigError
from longreel.trainer.families import FAMILIES, blocks, installed_attention, mochi, norm_rope, wan
from longreel.trainer.families.vae import scale_pixels
from longreel.trainer.flow import add_noise
from longreel.trainer.job import Job
from longreel.trainer.sampling.pipeline import generate

FP32, BF16 = torch.float32, torch.bfloat16
SIZE = (48, 64)  # pixels


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def sparse_transformer(family, pattern, dtype=FP32, block=16, **options):
    transformer = tiny.load_transformer(family, dtype)
    family.install(transformer, SparseAttention(pattern, block=block, **options))
    return transformer


def error(got, exact):
    return ((got - exact).norm() / exact.norm()).item()


# Attention


@pytest.mark.parametrize("trained", ["base", "lora"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dense_is_bit_equal_to_the_stock_model(family, trained, dtype):
    stock = tiny.load_transformer(family, dtype)
    ours = sparse_transformer(family, Dense(), dtype)
    if trained == "lora":
        for transformer in (stock, ours):
            randomise(lora.attach(transformer, family, rank=4))
    inputs = make_inputs(family, texts=(5, 5), dtype=dtype)
    expected, expected_grads = forward_backward(stock, inputs)
    out, grads = forward_backward(ours, inputs)
    assert torch.equal(out, expected)
    assert grads.keys() == expected_grads.keys() and grads
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())
    assert any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("texts", [(6,), (3, 7)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_all_blocks_are_within_the_stock_model_s_own_error(family, texts):
    inputs = make_inputs(family, texts=texts)
    double = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    stock_model = tiny.load_transformer(family)
    exact, exact_grads = forward_backward(tiny.load_transformer(family).double(), double)
    stock, stock_grads = forward_backward(stock_model, inputs)
    ours = sparse_transformer(family, AllBlocks(), backend="reference")
    out, grads = forward_backward(ours, inputs)
    with torch.no_grad():  # FlexAttention has no backward on a CPU
        flex = sparse_transformer(family, AllBlocks(), backend="flex")(**inputs).sample
    for got in (out, flex):
        assert error(got, exact) <= 2 * error(stock, exact)
    for name, grad in exact_grads.items():
        if grad.any():
            assert error(grads[name], grad) <= 3 * error(stock_grads[name], grad) + 1e-7, name


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fused_kernels_round_as_the_stock_modules_do(family, dtype):
    """The output to the bit, where the eager twin computes it; gradients are rounded less often."""
    inputs = make_inputs(family, texts=(5, 5), dtype=dtype)
    double = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    _, exact = forward_backward(tiny.load_transformer(family).to(dtype).double(), double)
    stock = tiny.load_transformer(family, dtype)
    names = stock.state_dict().keys()
    out, grads = forward_backward(stock, inputs)
    fused = tiny.load_transformer(family, dtype)
    family.install(fused, SparseAttention(Dense()), **tiny.fusions(family))
    assert fused.state_dict().keys() == names
    fused_out, fused_grads = forward_backward(fused, inputs)
    assert torch.equal(fused_out, out)
    for name, grad in exact.items():
        if grad.any():
            assert error(fused_grads[name], grad) <= 2 * error(grads[name], grad) + 1e-7, name


def test_fused_kernels_train_an_adapter_in_triton(family, interpreted, monkeypatch):
    """Its gradients through the kernels, against those through the stock modules."""
    ran = set()

    def compiled(kernel, name, *tensors, **options):
        ran.add(name)
        return kernel(*tensors, **options, backend="triton")

    ops = [(norm_rope, "norm_rope"), (mochi.blocks, "modulated_norm")]
    ops += [(wan.blocks, "modulated_norm"), (wan.blocks, "gated_add")]
    for module, name in ops:
        kernel = functools.partial(compiled, getattr(module, name), name)
        monkeypatch.setattr(module, name, kernel)
    inputs = make_inputs(family, frames=2, height=4, width=6, texts=(5,))
    grads = []
    for options in ({}, tiny.fusions(family)):
        transformer = tiny.load_transformer(family)
        family.install(transformer, SparseAttention(Dense()), **options)
        randomise(lora.attach(transformer, family, rank=4))
        grads.append(forward_backward(transformer, inputs))
    wanted = {"wan": {"modulated_norm", "gated_add"}, "mochi": {"modulated_norm"}}
    assert ran == {"norm_rope"} | wanted.get(family.name, set())
    (out, stock), (fused_out, fused) = grads
    torch.testing.assert_close(fused_out, out)
    for name, grad in stock.items():
        assert error(fused[name], grad) < 1e-5, name


def test_fused_kernels_are_taken_back(family):
    """Installing again takes them back, and keeps what came between: adapters, chunks and
    weights."""
    transformer = tiny.load_transformer(family)
    kinds = [type(module) for module in transformer.modules()]
    family.install(transformer, SparseAttention(Dense()), **tiny.fusions(family))
    fused = [type(module) for module in transformer.modules()]
    assert (fused != kinds) == (family.name != "hunyuan")
    randomise(lora.attach(transformer, family, rank=4))
    family.blocks.chunk_mlp(transformer, 64)
    names = transformer.state_dict().keys()
    out = transformer(**(inputs := make_inputs(family, frames=5, texts=(5,)))).sample
    family.install(transformer, SparseAttention(Dense()))
    assert transformer.state_dict().keys() == names
    assert not any(isinstance(module, blocks.Replacement) for module in transformer.modules())
    torch.testing.assert_close(transformer(**inputs).sample, out)


def test_each_sample_of_a_batch_is_as_if_alone(family):
    """Captions of different lengths share a batch; neither sees the other's padding."""
    inputs = make_inputs(family, frames=13, texts=(3, 40))
    ours = sparse_transformer(family, Radial())
    together = ours(**inputs).sample
    for index, length in enumerate((3, 40)):
        alone = {k: x[index : index + 1] for k, x in inputs.items()}
        if family.text.sequence_tokens:
            alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :length]
            alone["encoder_attention_mask"] = alone["encoder_attention_mask"][:, :length]
        torch.testing.assert_close(together[index], ours(**alone).sample[0], rtol=1e-4, atol=1e-5)


def test_a_sparse_pattern_changes_the_result(family):
    inputs = make_inputs(family, frames=25)
    stock = tiny.load_transformer(family)(**inputs).sample
    sparse = sparse_transformer(family, Radial())(**inputs).sample
    assert not torch.allclose(sparse, stock, atol=1e-3)
    layers = family.read_geometry(tiny.folder(family)).layers
    dense = sparse_transformer(family, Radial(), dense_layers=layers)
    assert torch.equal(dense(**inputs).sample, stock)


def test_layers_are_numbered_in_the_order_they_run(family, monkeypatch):
    transformer = sparse_transformer(family, Dense())
    attention, seen = installed_attention(transformer), []
    compute = attention.attention

    def recording(layer_index, q, k, v):
        seen.append((layer_index, tuple(q.shape)))
        return compute(layer_index, q, k, v)

    monkeypatch.setattr(attention, "attention", recording)
    geometry = family.read_geometry(tiny.folder(family))
    transformer(**make_inputs(family, texts=(5, 5)))
    text = 5 if family.text.sequence_tokens else 0
    grid = TokenGrid(9, 3, 5, text)
    shape = (2, len(grid), geometry.heads, geometry.head_dim)
    assert seen == [(layer, shape) for layer in range(geometry.layers)]
    assert attention.current.grid == grid and attention.current.valid is None


def test_installing_again_replaces_hook_and_attention(family):
    transformer = sparse_transformer(family, Radial())
    family.install(transformer, SparseAttention(Dense()))
    assert len(transformer._forward_pre_hooks) == 1
    assert installed_attention(transformer).pattern == Dense()
    inputs = make_inputs(family, frames=25)
    stock = tiny.load_transformer(family)
    assert torch.equal(transformer(**inputs).sample, stock(**inputs).sample)
    assert installed_attention(stock) is None


def test_positional_arguments_reach_the_plan(family):
    transformer = sparse_transformer(family, Dense())
    attention = installed_attention(transformer)
    attention.schedule, attention.dense_steps = (lambda timestep: int(timestep[0] < 500)), 1
    inputs = make_inputs(family)
    first = inputs.pop("hidden_states")
    for value, dense in ((900.0, True), (100.0, False)):
        transformer(first, **inputs | {"timestep": torch.tensor([value])})
        assert attention.current.dense is dense


def test_two_forwards_before_one_backward_with_checkpointing(family):
    long = make_inputs(family, frames=13, texts=(9,))
    short = make_inputs(family, frames=9, height=4, texts=(2,), seed=1)
    plain, checkpointed = (sparse_transformer(family, Radial()) for _ in range(2))
    expected = {}
    for inputs in (long, short):
        plain.zero_grad()
        for name, grad in forward_backward(plain, inputs)[1].items():
            expected[name] = expected.get(name, 0) + grad.clone()
    attention = installed_attention(checkpointed)
    checkpointed.enable_gradient_checkpointing(attention.recomputing)
    checkpointed.train()
    total = 0
    for inputs in (long, short):
        out = checkpointed(**inputs).sample
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        total = total + (out * direction).sum()
    total.backward()
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# Text


@pytest.mark.parametrize("name", ["hunyuan", "mochi"])
def test_padding_on_the_left_is_refused(name):
    """Cut by its length, most of what remained would be padding."""
    pipe = tiny.load_pipeline(FAMILIES[name], vae=False)
    assert len(FAMILIES[name].text.encode(pipe, "a cat")["prompt_embeds"]) < 10
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ConfigError, match="pads on the left.*set padding_side to right"):
        FAMILIES[name].text.encode(pipe, "a cat")


def test_text_encoder_and_vae_are_never_both_in_memory(family, videos, tmp_path, monkeypatch):
    """Nor is either of them left when the transformer is loaded."""
    arguments = arguments_of(family.name, videos, tmp_path / "cache", tmp_path / "run")
    job = Job.from_config(load([*arguments, f"model.path={tiny.folder(family)}"]))
    load_pipeline, loaded, seen = family.loader.load_pipeline, [], []

    def recording(_, *args, **options):
        assert not any(part() for part in loaded)
        pipe = load_pipeline(*args, **options)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, Module)}
        loaded.extend(map(weakref.ref, parts.values()))
        seen.append(set(parts))
        return pipe

    monkeypatch.setattr(type(family.loader), "load_pipeline", recording)
    assert len(prepare_data(job, Accelerator(cpu=True), FP32).entries) == 3
    text = {name for name in family.loader.text_components if name.startswith("text_encoder")}
    assert seen == [text, {"vae"}] and not any(part() for part in loaded)


# Conventions, against the pipeline's own loop


def moving_squares(frames, height=SIZE[0], width=SIZE[1]):
    pixels = torch.full((frames, height, width, 3), 40, dtype=torch.uint8)
    for i in range(frames):
        pixels[i, 8 + i : 24 + i, 4 * i : 4 * i + 16] = torch.tensor([250, 60 + 9 * i, 90])
    return pixels


def frames_of(family):
    """A short valid length of several latent frames."""
    return 2 * family.read_geometry(tiny.folder(family)).frame_step + 1


def test_true_velocity_takes_the_pipeline_from_noise_to_the_video(family):
    pipe, pixels = tiny.load_pipeline(family), moving_squares(frames_of(family))
    clean = family.vae.encode(pipe.vae, pixels)[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    calls = []

    def answer(module, args, kwargs, output):
        calls.append(kwargs)
        return (family.noising.target(clean, noise),)

    pipe.transformer.register_forward_hook(answer, with_kwargs=True)
    latents = pipe(
        **family.text.pipeline_inputs(make_text(family), None, 1.0),
        latents=noise,
        height=pixels.shape[1],
        width=pixels.shape[2],
        num_inference_steps=4,
        output_type="latent",
    ).frames
    torch.testing.assert_close(latents, clean, atol=1e-4, rtol=0)
    assert len(calls) == 4
    start, end = family.noising.timestep(torch.tensor([0.0, 1.0])).tolist()
    for call in calls:
        # Wan's pipeline truncates its timesteps to integers: sigma is right to 1e-3.
        sigma = (call["timestep"] - start) / (end - start)
        noisy = add_noise(clean, noise, sigma)
        torch.testing.assert_close(call["hidden_states"], noisy, atol=8e-3, rtol=0)


def test_latents_are_normalised_and_repeatable(family):
    pipe, pixels = tiny.load_pipeline(family), moving_squares(frames_of(family))
    latents = family.vae.encode(pipe.vae, pixels)
    shape = family.geometry_of(pipe).latent_shape(len(pixels), *SIZE)
    assert latents.shape == shape and latents.dtype == FP32
    assert 0.3 < latents.std() < 3 and latents.mean().abs() < 1
    assert torch.equal(latents, family.vae.encode(pipe.vae, pixels))


def test_encoding_in_chunks_equals_encoding_at_once(family):
    """Lengths within a chunk, at its end and past it; sizes with and without tiles in space."""
    vae = tiny.load_pipeline(family).vae
    generator = torch.Generator().manual_seed(0)
    step = family.read_geometry(tiny.folder(family)).frame_step
    for frames in (1, step + 1, 16 + 1, 24 + 1, 37):
        frames = (frames - 1) // step * step + 1
        pixels = torch.randint(0, 256, (frames, *SIZE, 3), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            chunks = list(family.vae.encode_chunks(vae, pixels))
            whole = vae.encode(scale_pixels(vae, pixels)).latent_dist.mode()
        assert len(chunks) > 1 or frames <= 17 or family.name == "mochi"
        torch.testing.assert_close(torch.cat(chunks, dim=2), whole, atol=1e-5, rtol=1e-5)


def test_captions_are_cut_where_the_text_encoder_stops_reading(family):
    """Words after `caption_tokens` change nothing, words before it do."""
    pipe = tiny.load_pipeline(family)
    tokenizer = family.loader.caption_tokenizer(tiny.folder(family), None)
    caption = "a red fox runs " * 60
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
    limit = family.text.caption_tokens
    assert len(ids) > limit + 8
    kept, rest = tokenizer.decode(ids[:limit]), tokenizer.decode(ids[limit:])
    assert kept + rest == caption

    def embedding(text: str) -> torch.Tensor:
        return family.text.encode(pipe, text)["prompt_embeds"]

    assert torch.equal(embedding(caption), embedding(kept + rest.upper()))
    assert not torch.equal(embedding(caption), embedding(kept[:-8] + "blue sky" + rest))


def test_normalising_is_undone_before_decoding(family):
    pipe = tiny.load_pipeline(family)
    latents = torch.randn(1, family.geometry_of(pipe).latent_channels, 2, 3, 4)
    there = family.vae.normalise(pipe.vae, latents)
    torch.testing.assert_close(family.vae.denormalise(pipe.vae, there), latents)
    assert not torch.allclose(there, latents)


def test_generate_equals_the_stock_pipeline_call(family):
    pipe = tiny.load_pipeline(family)
    frames = frames_of(family)
    options = {"height": SIZE[0], "width": SIZE[1]}
    texts = {"prompt": "a cat", "negative": "blurry"}
    video = np.stack(list(generate(pipe, **texts, frames=frames, steps=3, seed=3, **options)))
    assert video.shape == (frames, *SIZE, 3) and video.dtype == np.uint8 and video.std() > 1
    # Wan's rounding of `num_frames` adds one under a VAE that keeps every frame.
    stock = pipe(
        "a cat",
        negative_prompt="blurry",
        num_frames=frames - 1 if family.name == "wan" else frames,
        num_inference_steps=3,
        guidance_scale=family.defaults.guidance,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).frames[0]
    difference = np.abs(video.astype(int) - (stock * 255).round().astype(int))
    # The pipeline's text is padded, ours is not: sums over it are rounded otherwise.
    assert difference.max() <= (1 if family.text.sequence_tokens else 0)


def test_frames_are_decoded_as_they_are_asked_for(family):
    """However long the video, a few latent frames' pixels are in memory at a time."""
    pipe = tiny.load_pipeline(family)
    geometry = family.geometry_of(pipe)
    frames = 12 * geometry.frame_step + 1
    shape = geometry.latent_shape(frames, 32, 32)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    calls = []
    pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    video = family.vae.decode(pipe.vae, latents)
    first = next(video)
    assert torch.is_grad_enabled() and first.shape == (32, 32, 3)
    some = len(calls)
    rest = list(video)
    assert len(rest) == frames - 1 and len(calls) >= 2 * some


@pytest.mark.parametrize("alpha", [None, 8])
def test_stock_diffusers_reloads_the_adapter(family, alpha, tmp_path):
    trained = sparse_transformer(family, Dense())
    randomise(lora.attach(trained, family, rank=4, alpha=alpha))
    lora.save(tmp_path, trained, family, {"version": 1})
    pipe = tiny.load_pipeline(family)
    inputs = make_inputs(family)
    bare = pipe.transformer(**inputs).sample
    pipe.load_lora_weights(tmp_path, adapter_name="ours")
    loaded = pipe.transformer(**inputs).sample
    assert torch.equal(loaded, trained(**inputs).sample)
    assert not torch.allclose(loaded, bare, atol=1e-2)


def test_named_targets_match_what_they_say(family):
    transformer = family.loader.blank_transformer(tiny.folder(family), None)
    layers = family.read_geometry(tiny.folder(family)).layers
    for name in family.layers.lora_targets:
        lora.check_targets(transformer, family.layers.target_pattern(name))
    default = family.layers.target_pattern(None)
    assert default == family.layers.target_pattern("attention")
    assert family.layers.target_pattern(r".*\.to_q") == r".*\.to_q"
    parameters = lora.attach(tiny.load_transformer(family), family, rank=2)
    assert sum(".to_q.lora_A" in name for name, _ in parameters) == layers


def test_bf16_base_keeps_the_vae_and_the_prediction_in_fp32(family):
    transformer = tiny.load_transformer(family, BF16)
    pipe = family.loader.load_pipeline(
        tiny.folder(family), None, transformer=transformer, text=False, dtype=BF16
    )
    assert pipe.vae.dtype == FP32 and pipe.transformer.dtype == BF16
    noisy, sigma = make_inputs(family)["hidden_states"], torch.tensor([0.5])
    guidance = 1.0 if family.geometry_of(pipe).guidance_embeds else None
    text = family.text.collate([make_text(family)])
    prediction = family.noising.predict(transformer, noisy, sigma, text, guidance)
    assert prediction.dtype == FP32 and prediction.shape == noisy.shape


# Files


def test_parts_that_are_not_asked_for_are_not_read(family, tmp_path):
    folder = shutil.copytree(tiny.folder(family), tmp_path / "model")
    for part in (*family.loader.text_components, "vae", "transformer"):
        shutil.rmtree(folder / part)
    pipe = family.loader.load_pipeline(str(folder), None, text=False, vae=False, dtype=FP32)
    for part in (*family.loader.text_components, "vae", "transformer"):
        assert getattr(pipe, part) is None


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_missing_files_say_what_to_fetch_and_how(family, where, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    path = "/nowhere/model" if where == "folder" else family.names.repository
    with pytest.raises(ConfigError) as caught:
        family.read_geometry(path)
    message = str(caught.value)
    assert f"model.path={path}" in message and "local folder" in message
    assert f"hf download {family.names.repository}" in message


def test_missing_weights_say_what_to_fetch(family, tmp_path):
    folder = shutil.copytree(tiny.folder(family), tmp_path / "model")
    next((folder / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="hf download"):
        family.loader.load_transformer(str(folder), None, FP32)


def test_another_family_s_model_is_refused_by_name(family):
    other = next(f for f in FAMILIES.values() if f is not family)
    with pytest.raises(ConfigError, match=f"{other.names.pipeline}; family={family.name} covers"):
        family.read_geometry(tiny.folder(other))


def test_tiny_is_built_once_and_always_the_same(family, tmp_path):
    state = torch.random.get_rng_state()
    first = Path(family.loader.resolve("tiny", tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    stamps = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert family.loader.resolve("tiny", tmp_path) == str(first)
    assert stamps == {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert list(tmp_path.iterdir()) == [first]
    files = [str(file.relative_to(first)) for file in stamps if file.is_file()]
    assert len(files) >= 8
    assert filecmp.cmpfiles(first, tiny.folder(family), files, shallow=False)[0] == files


def test_resolve_leaves_other_paths_alone(family, tmp_path):
    assert family.loader.resolve("some/repository", tmp_path) == "some/repository"
    assert family.loader.resolve(None, tmp_path) == family.names.repository
    assert not list(tmp_path.iterdir())
