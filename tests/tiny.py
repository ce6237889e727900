"""The tiny Wan model, small inputs for it, and a pattern that keeps all."""

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass

import torch

from longreel.trainer.families import FAMILIES

WAN = FAMILIES["wan"]


@functools.cache
def wan_folder() -> str:
    """The tiny model's folder, built once a process."""
    cache = tempfile.mkdtemp(prefix="longreel-tiny-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    return WAN.resolve("tiny", cache)


def wan_transformer(dtype=torch.float32):
    return WAN.load_transformer(wan_folder(), None, dtype)


def wan_pipeline(transformer=None, **parts):
    """A pipeline of its own around `transformer`, a fresh one by default."""
    transformer = wan_transformer() if transformer is None else transformer
    return WAN.load_pipeline(
        wan_folder(), None, transformer=transformer, dtype=torch.float32, **parts
    )


def wan_inputs(batch=1, frames=9, height=6, width=10, seed=0, dtype=torch.float32):
    """Arguments of a forward on `frames` x 3 x 5 tokens by default."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 4, frames, height, width)
    texts = [wan_text(5 + i, seed=seed + i) for i in range(batch)]
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "encoder_hidden_states": WAN.collate_text(texts)["encoder_hidden_states"].to(dtype),
    }


def wan_text(tokens=7, seed=0):
    """As `encode_text` gives it."""
    generator = torch.Generator().manual_seed(seed)
    return {"prompt_embeds": torch.randn(tokens, 32, generator=generator)}


def randomise(named_parameters, seed=0):
    """Give a new adapter, which does nothing, weights that show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in named_parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@dataclass(frozen=True)
class AllBlocks:
    """Keeps everything, and unlike `Dense` goes through the block-sparse kernel."""

    def keep(self, grid, q, kv):
        return torch.ones(torch.broadcast_shapes(q.shape, kv.shape), dtype=torch.bool)

    def blocks(self, grid, block):
        return torch.ones(2 * [-(-grid.video // block)], dtype=torch.bool)
