"""Blocks and norms that take the place of diffusers' own: nothing changes for who looks at them."""

import copy

import pytest
import tiny
import torch

from longreel.sparse.attention import SparseAttention
from longreel.sparse.patterns import Dense
from longreel.trainer.families import FAMILIES
from longreel.trainer.families.blocks import Replacement
from longreel.trainer.families.names import diffusers_class

FUSING = {name: family for name, family in FAMILIES.items() if family.blocks.fuses_modulation}
WAN = FAMILIES["wan"]


@pytest.fixture(params=FUSING.values(), ids=FUSING)
def family(request):
    return request.param


def install(family, transformer, fused=True):
    family.install(transformer, SparseAttention(Dense()), fused_modulation=fused)
    return transformer


def load(family, fused=True):
    return install(family, tiny.load_transformer(family), fused)


def classes(transformer):
    return {type(module).__name__ for module in transformer.modules()}


@torch.no_grad()
def assert_as_stock(family, fused, stock):
    inputs = tiny.make_inputs(family, frames=3, texts=(5, 5))
    assert torch.equal(fused(**inputs).sample, stock(**inputs).sample)


def test_a_single_frame(family):
    """Mochi's embedder then leaves a channel's tokens beside each other in memory, and the stock
    norms sum in another order."""
    inputs = tiny.make_inputs(family, frames=1)
    fused, stock = load(family), tiny.load_transformer(family)
    torch.testing.assert_close(fused(**inputs).sample, stock(**inputs).sample)


def test_under_autocast(family):
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_stock(family, load(family), load(family, fused=False))


def test_wan_without_a_norm_before_cross_attention():
    """`cross_attn_norm`, which the published models have."""
    config = tiny.load_config(WAN) | {"cross_attn_norm": False}
    stock = diffusers_class(WAN.names.transformer).from_config(config).eval()
    assert_as_stock(WAN, install(WAN, copy.deepcopy(stock)), stock)


def test_policies_find_the_blocks_by_name(family):
    """accelerate those to wrap, diffusers those to compile."""
    stock = tiny.load_transformer(family)
    named = {*stock._no_split_modules, *(stock._repeated_blocks or ())} & classes(stock)
    assert named and named <= classes(load(family))


def test_modes_are_those_of_the_model(family):
    transformer = load(family)
    assert not any(m.training for m in transformer.modules() if isinstance(m, Replacement))
    install(family, transformer.train(), fused=False)
    assert all(module.training for module in transformer.modules())


def test_a_copy_has_weights_of_its_own(family):
    transformer = load(family)
    copied = copy.deepcopy(transformer)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    restored = install(family, copied, fused=False)
    assert not any(parameter.any() for parameter in restored.parameters())
    assert_as_stock(family, transformer, tiny.load_transformer(family))


def test_wan_refuses_a_noise_level_a_token():
    inputs = tiny.make_inputs(WAN, frames=3)
    inputs["timestep"] = inputs["timestep"][:, None].expand(-1, 3 * 3 * 5)
    tiny.load_transformer(WAN)(**inputs)
    with pytest.raises(ValueError, match=r"one noise level a sample.*speed\.fused_modulation"):
        load(WAN)(**inputs)
