"""Mochi's VAE in parts, against the stock one at once; and the scale of its latents."""

import pytest
import tiny
import torch
from diffusers import AutoencoderKLMochi
from torch.utils._python_dispatch import TorchDispatchMode

from longreel.trainer.families import FAMILIES
from longreel.trainer.families.mochi.vae import ContinuedConv
from longreel.trainer.families.vae import scale_pixels

MOCHI = FAMILIES["mochi"]


def deep_vae(**options):
    """Return a VAE with a residual block at every resolution, as the real one."""
    torch.manual_seed(0)
    channels = {f"{part}_block_out_channels": (32,) * 4 for part in ("encoder", "decoder")}
    return AutoencoderKLMochi(**channels, layers_per_block=(1,) * 5, **options).eval()


@torch.no_grad()
def test_chunks_are_those_of_decoding_at_once():
    """Up to fp32 rounding: a convolution sums in an order that depends on its size."""
    vae, latents = deep_vae(), tiny.make_latents(MOCHI, frames=5, height=4, width=6)
    modules, state = dict(vae.named_modules()), list(vae.state_dict())
    whole = vae.decode(latents).sample
    vae.enable_tiling(16, 16, 8, 8)  # of the encoder
    assert not torch.allclose(vae.decode(latents).sample, whole, atol=1e-2)
    chunks = list(MOCHI.vae.decode_chunks(vae, latents))
    assert [chunk.shape for chunk in chunks] == [(1, 3, n, 32, 48) for n in (7, 12, 6)]
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, atol=1e-5, rtol=0)
    assert (whole[:, :, 6:8] - whole[:, :, 7:9]).abs().max() > 1e-2  # across the first seam
    # Each chunk sees the one before it: by itself it is another.
    alone, *_ = MOCHI.vae.decode_chunks(vae, latents[:, :, 2:4])
    assert not torch.allclose(alone[:, :, 0], chunks[1][:, :, 5], atol=1e-2)

    started, other = (MOCHI.vae.decode_chunks(vae, latents) for _ in range(2))
    assert torch.equal(next(started), chunks[0])
    assert torch.equal(next(other), chunks[0]) and torch.equal(next(started), chunks[1])
    started.close()
    assert torch.equal(next(other), chunks[1])
    assert list(vae.state_dict()) == state and dict(vae.named_modules()) == modules
    assert not any(isinstance(module, ContinuedConv) for module in vae.modules())
    vae.disable_tiling()
    assert torch.equal(vae.decode(latents).sample, whole)


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (frames, height, width, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    "frames, attention_first", [(1, False), (7, False), (25, False), (31, False), (43, True)]
)
def test_encoding_in_parts_equals_encoding_at_once(frames, attention_first):
    """Up to fp32 rounding: 12 frames at a time through convolutions, some places at a time through
    attention; the numbers of frames are within a chunk, at its end and past it."""
    blocks = (attention_first, True, True, False, True)
    vae, pixels = deep_vae(add_attention_block=blocks), clip(frames, 16, 24)
    state, modules = list(vae.state_dict()), dict(vae.named_modules())
    whole = vae.encode(scale_pixels(vae, pixels)).latent_dist.mode()
    (parts,) = MOCHI.vae.encode_chunks(vae, pixels)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert list(vae.state_dict()) == state and dict(vae.named_modules()) == modules
    if frames > 25:  # the last chunk goes by what came before it: by itself it is another
        (alone,) = MOCHI.vae.encode_chunks(vae, pixels[24:])
        assert not torch.allclose(alone[:, :, -1], whole[:, :, -1], atol=1e-3)


@torch.no_grad()
def test_encoding_in_parts_takes_tiles_as_the_stock_encoder(monkeypatch):
    """And a few rows of places at a time through attention, where there are many."""
    monkeypatch.setattr("longreel.trainer.families.mochi.vae.MOST_PLACES", 20)
    vae, pixels = deep_vae(), clip(19, 16, 24)
    whole = vae.encode(scale_pixels(vae, pixels)).latent_dist.mode()
    vae.enable_tiling(16, 16, 8, 8)
    tiled = vae.encode(scale_pixels(vae, pixels)).latent_dist.mode()
    assert not torch.allclose(tiled, whole, atol=1e-3)
    (parts,) = MOCHI.vae.encode_chunks(vae, pixels)
    torch.testing.assert_close(parts, tiled, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that one tensor held."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@torch.no_grad()
def test_no_layer_sees_a_whole_clip_at_its_full_size():
    """A layer sees in all frames at once 32 channels of each pixel; in parts, those of half the
    height and width are the most that there is of a whole clip."""
    vae, pixels = deep_vae(), clip(61, 16, 16)
    with Largest() as at_once:
        vae.encode(scale_pixels(vae, pixels))
    with Largest() as in_parts:
        list(MOCHI.vae.encode_chunks(vae, pixels))
    assert at_once.numbers >= 32 * 61 * 16 * 16
    assert in_parts.numbers <= max(32 * 61 * 8 * 8, 32 * (13 + 2) * 18 * 18)


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [331, 667])
def test_a_tile_of_the_longest_clips_is_encoded(frames):
    """The encoder of the published widths encodes it, in fp32."""
    with torch.device("cuda"):
        vae = AutoencoderKLMochi().eval()
    pixels = clip(frames, 256, 256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    latents = MOCHI.vae.encode(vae, pixels)
    assert latents.shape == (12, (frames - 1) // 6 + 1, 32, 32)
    assert latents.isfinite().all()
    at_full_size = 64 * frames * 256 * 256 * 4
    assert torch.cuda.max_memory_allocated() - before < 3 * at_full_size


@torch.no_grad()
def test_the_stock_switch_to_chunks_does_not_run():
    """Why the decoder gets convolutions of ours: this drops the padding of the stock ones."""
    vae = deep_vae()
    vae._enable_framewise_decoding()
    with pytest.raises(RuntimeError, match="size"):
        vae.decode(tiny.make_latents(MOCHI))


@pytest.mark.parametrize("known", [True, False])
def test_normalising_is_undone_and_rounds_as_the_pipeline(known):
    statistics = {} if known else {"latents_mean": None}
    vae = deep_vae(scaling_factor=1.3, **statistics)
    latents = tiny.make_latents(MOCHI)
    mean, std = torch.zeros(12), torch.ones(12)
    if known:
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    mean, std = mean.view(12, 1, 1, 1), std.view(12, 1, 1, 1)
    assert torch.equal(MOCHI.vae.denormalise(vae, latents), latents * std / 1.3 + mean)
    back = MOCHI.vae.normalise(vae, MOCHI.vae.denormalise(vae, latents))
    torch.testing.assert_close(back, latents, atol=1e-6, rtol=1e-6)
