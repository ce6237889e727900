"""The Wan family against the stock diffusers model and pipeline."""

import pytest
import tiny
import torch
from tiny import WAN

from longreel.sparse.attention import SparseAttention
from longreel.sparse.grid import TokenGrid
from longreel.sparse.patterns import Dense
from longreel.trainer.config.values import ConfigError

BF16 = torch.bfloat16


def sparse_transformer(pattern, dtype=torch.float32, block=16, **options):
    transformer = tiny.load_transformer(WAN, dtype)
    WAN.install(transformer, SparseAttention(pattern, block=block, **options))
    return transformer


# Attention


def test_fused_projections_are_followed():
    inputs = tiny.make_inputs(WAN)
    stock, ours = tiny.load_transformer(WAN), sparse_transformer(Dense())
    for transformer in (stock, ours):
        transformer.fuse_qkv_projections()
    assert torch.equal(ours(**inputs).sample, stock(**inputs).sample)


def test_attention_over_text_stays_stock():
    blocks = sparse_transformer(Dense()).blocks
    assert {type(block.attn2.processor).__name__ for block in blocks} == {"WanAttnProcessor"}
    assert len({id(block.attn1.processor) for block in blocks}) == 3


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


@pytest.mark.parametrize("caption", ["", "two  cats &amp; a dog", "x" * 2000])
def test_cached_text_is_bit_equal_to_what_the_pipeline_feeds(caption):
    pipe = tiny.load_pipeline(WAN, vae=True)
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
    texts = [WAN.text.encode(pipe, text) for text in (caption, "blurry")]
    batch = WAN.text.collate(texts)["encoder_hidden_states"]
    assert batch.shape[1] == 512 and not batch.requires_grad
    assert texts[0]["prompt_embeds"].shape[0] == min(
        len(caption.replace("&amp;", "&")) + 1, 512
    ) - (caption.count("  "))
    for row, call in zip(batch, calls, strict=True):
        assert torch.equal(row, call["encoder_hidden_states"][0])
    kwargs = WAN.text.pipeline_inputs(*texts, 5.0)
    assert torch.equal(
        torch.cat([kwargs["prompt_embeds"], kwargs["negative_prompt_embeds"]]), batch
    )


def test_encode_prompt_alone_would_pad_to_226_and_the_pipeline_pads_to_512():
    """Padding is attended, so a cache made with the default would be of another text."""
    pipe = tiny.load_pipeline(WAN, vae=False)
    assert pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[0].shape[1] == 226
    batch = WAN.text.collate([WAN.text.encode(pipe, "a cat")])
    assert batch["encoder_hidden_states"].shape[1] == 512
    long = WAN.text.encode(pipe, "x" * 300)["prompt_embeds"]
    assert len(long) == 301  # none is cut at 226


def test_bf16_leaves_what_the_model_keeps_in_fp32():
    """Modulations, norms and positions: `.to(torch.bfloat16)` would round them."""
    transformer = tiny.load_transformer(WAN, torch.bfloat16)
    transformer = tiny.load_pipeline(WAN, transformer, text=False).to("cpu").transformer
    kept = {
        name.rpartition(".")[0] for name, p in transformer.named_parameters() if p.dtype != BF16
    }
    kept = {name.rpartition(".")[2] or "scale_shift_table" for name in kept}
    assert {"scale_shift_table", "norm2"} <= kept and "to_q" not in kept
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert transformer.rope.freqs_cos.dtype == torch.float32
    assert transformer.dtype == BF16  # what the family feeds it


def test_padding_is_attended():
    """Why text is padded again before the model, and not left short."""
    inputs = tiny.make_inputs(WAN)
    short = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"][:, :5])
    transformer = tiny.load_transformer(WAN)
    assert not torch.allclose(transformer(**inputs).sample, transformer(**short).sample, atol=1e-3)


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
    return tiny.write_model(tmp_path, files)


def test_published_sizes(tmp_path):
    geometry = WAN.read_geometry(published(tmp_path))
    assert (geometry.temporal, geometry.spatial, geometry.patch) == (4, 8, (1, 2, 2))
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (30, 12, 128)
    assert [geometry.extended_frames(WAN.defaults.native_frames, n) for n in (2, 4)] == [
        161,
        321,
    ]
    shape = geometry.latent_shape(161, 480, 832)
    assert shape == (16, 41, 60, 104)
    assert geometry.grid(shape) == TokenGrid(41, 30, 52)


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
        WAN.read_geometry(published(tmp_path, **changes))
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
    geometry = WAN.read_geometry(published(tmp_path))
    with pytest.raises(ConfigError, match=f"frames={frames}.*{message}"):
        geometry.check_frames(frames)
    geometry.check_frames(4093)


def test_tiny_frames_follow_the_vae_s_chunks_of_four():
    """Every length has latents without temporal compression, but the VAE still drops a rest."""
    geometry = WAN.read_geometry(tiny.folder(WAN))
    assert geometry.latent_shape(49, 160, 192) == (4, 49, 20, 24)
    with pytest.raises(ConfigError, match="49 and 53"):
        geometry.check_frames(50)
    dropped = WAN.vae.encode(tiny.load_pipeline(WAN).vae, moving_squares(frames=10))
    assert dropped.shape[1] == 9


def test_pixels_that_do_not_make_patches(tmp_path):
    geometry = WAN.read_geometry(published(tmp_path))
    with pytest.raises(ConfigError, match="height=100 must be a multiple of 16.*96 and 112"):
        geometry.latent_shape(81, 100, 192)
