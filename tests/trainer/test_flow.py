"""Noise levels, noising and the loss."""

import pytest
import tiny
import torch

from longreel.trainer.config.schema import Sigma
from longreel.trainer.families import FAMILIES
from longreel.trainer.flow import add_noise, flow_matching_loss, sample, sample_sigmas


def draw(batch=4096, seed=0, **config):
    return sample_sigmas(batch, Sigma(**config), torch.Generator().manual_seed(seed))


def test_uniform_sigmas_fill_the_unit_interval():
    sigma = draw()
    quantiles = sigma.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.03, rtol=0)
    assert sigma.dtype == torch.float32 and sigma.min() >= 0 and sigma.max() <= 1


def test_logit_normal_sigmas_have_the_logit_s_mean_and_std():
    logit = draw(name="logit_normal", mean=-0.7, std=0.5).logit()
    assert logit.mean().item() == pytest.approx(-0.7, abs=0.03)
    assert logit.std().item() == pytest.approx(0.5, abs=0.03)


def test_shift_is_applied_to_the_same_draws():
    plain, shifted = draw(), draw(shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert (shifted >= plain).all()


def test_sigmas_follow_the_generator():
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))


def test_a_step_s_noise_and_sigma_are_fp32_and_follow_the_generator():
    clean = torch.zeros(3, 4, 5, 6, 7, dtype=torch.bfloat16)
    first, same, other = (
        sample(clean, Sigma(shift=3.0), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    noise, sigma = first
    assert noise.shape == clean.shape and sigma.shape == (3,)
    assert noise.dtype == sigma.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(sigma, draw(batch=3, seed=1, shift=3.0))


def test_noise_runs_from_clean_to_noise_for_each_sample():
    clean, noise = torch.randn(2, 3, 4, 5, 6, 7).bfloat16()
    noisy = add_noise(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy[0], clean[0].float()) and torch.equal(noisy[1], noise[1].float())
    torch.testing.assert_close(noisy[2], 0.75 * clean[2].float() + 0.25 * noise[2].float())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_loss_is_zero_for_the_true_velocity(family):
    """It is at the noise level that was asked for: no pipeline, so no scheduler, has a say in
    it."""
    channels = tiny.load_config(family)["in_channels"]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, channels, 5, 4, 6, generator=generator)
    transformer = tiny.load_transformer(family)
    text = family.text.collate([tiny.make_text(family)])
    guidance = 1.0 if family is FAMILIES["hunyuan"] else None
    sigma = torch.tensor([0.3])
    seen = {}

    def oracle(module, args, kwargs, output):
        seen.update(kwargs)
        return (family.noising.target(clean, noise),)

    def loss():
        return flow_matching_loss(family, transformer, clean, text, sigma, noise, guidance)

    assert loss().dim() == 0 and loss().item() > 0.5
    transformer.register_forward_hook(oracle, with_kwargs=True)
    assert loss().item() == 0
    assert seen["timestep"].item() == pytest.approx(700 if family is FAMILIES["mochi"] else 300)
    assert torch.equal(seen["hidden_states"], add_noise(clean, noise, sigma))
