"""The tiny models, small inputs for them, and a pattern that keeps all."""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass

import torch

from longreel.sparse.patterns import SparsePattern
from longreel.trainer.families import FAMILIES
from longreel.trainer.families.base import ModelFamily

WAN = FAMILIES["wan"]


@functools.cache
def _cache() -> str:
    folder = tempfile.mkdtemp(prefix="longreel-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def folder(family: ModelFamily) -> str:
    """The tiny model's folder, built once a process."""
    return family.loader.resolve("tiny", _cache())


def load_transformer(family: ModelFamily, dtype=torch.float32):
    return family.loader.load_transformer(folder(family), None, dtype)


def fusions(family: ModelFamily) -> dict[str, bool]:
    """Options of `install` for all fused kernels that the family has."""
    return {"fused_norms": True, "fused_modulation": family.blocks.fuses_modulation}


def load_pipeline(family: ModelFamily, transformer=None, **parts):
    """A pipeline of its own around `transformer`, a fresh one by default."""
    transformer = load_transformer(family) if transformer is None else transformer
    return family.loader.load_pipeline(
        folder(family), None, transformer=transformer, dtype=torch.float32, **parts
    )


def make_inputs(
    family: ModelFamily,
    frames=9,
    height=6,
    width=10,
    texts=(5,),
    seed=0,
    dtype=torch.float32,
):
    """Arguments of a forward, a sample for each length in `texts`; 9 x 3 x 5 tokens by default."""
    generator = torch.Generator().manual_seed(seed)
    config = load_config(family)
    shape = (len(texts), config["in_channels"], frames, height, width)
    inputs = {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.rand(len(texts), generator=generator) * 1000,
        **family.text.collate([make_text(family, n, seed=seed + i) for i, n in enumerate(texts)]),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((len(texts),), 1000.0)
    fp32 = ("timestep", "guidance")  # as the pipelines and the trainer have them
    return {
        name: x.to(dtype) if x.is_floating_point() and name not in fp32 else x
        for name, x in inputs.items()
    }


def make_latents(family: ModelFamily, frames=2, height=4, width=6, seed=0):
    """Gaussian latents of one sample."""
    generator = torch.Generator().manual_seed(seed)
    channels = load_config(family)["in_channels"]
    return torch.randn(1, channels, frames, height, width, generator=generator)


def make_text(family: ModelFamily, tokens=7, seed=0):
    """Return a caption as `text.encode` gives it."""
    generator = torch.Generator().manual_seed(seed)
    config = load_config(family)
    width = config.get("text_dim") or config["text_embed_dim"]
    text = {"prompt_embeds": torch.randn(tokens, width, generator=generator)}
    if family.name == "hunyuan":
        pooled = config["pooled_projection_dim"]
        text["pooled_prompt_embeds"] = torch.randn(pooled, generator=generator)
    return text


@functools.cache
def load_config(family: ModelFamily):
    return dict(family.loader.blank_transformer(folder(family), None).config)


def write_model(folder, files):
    """JSON files of a model by their names; returns the folder as recipes give it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return str(folder)


def forward_backward(transformer, inputs):
    """Output and the gradients of whatever is trainable, for one fixed direction."""
    out = transformer(**inputs, return_dict=False)[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    (out * direction).sum().backward()
    grads = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    return out.detach(), grads


def randomise(named_parameters, seed=0):
    """Give a new adapter, which does nothing, weights that show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in named_parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@dataclass(frozen=True)
class AllBlocks(SparsePattern):
    """Keeps everything, and unlike `Dense` goes through the block-sparse kernel."""

    def keep(self, grid, q, kv, block=128, layout=0):
        return torch.ones(torch.broadcast_shapes(q.shape, kv.shape), dtype=torch.bool)

    def blocks(self, grid, block):
        return torch.ones(2 * [-(-grid.video // block)], dtype=torch.bool)
