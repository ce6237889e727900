"""Export of adapters to ComfyUI, under the layer names of the published checkpoints."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.files import read_tensors, replacing, save_tensors
from ..adapter.lora import WEIGHTS, adapter_file, first_names, read_entry, read_updates
from ..config.schema import Cache
from ..config.values import ConfigError
from ..families import ModelFamily, RopePolicy, family_of
from .pipeline import base_model

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # of layer names; the weights inside a ComfyUI checkpoint have it too
SUFFIX = "_comfyui.safetensors"

Updates = Mapping[str, tuple[Tensor, Tensor]]  # A [rank, in] and B [out, rank] by layer


def export_comfyui(
    run: str | Path,
    out: str | Path | None = None,
    *,
    model_path: str | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path = Cache.dir,
) -> Path:
    """Write a run's adapter for ComfyUI, whole and read back or not at all; returns the file.

    run: an adapter's folder or file. out: None for `NAME_comfyui.safetensors` beside it, where NAME
    is the folder's name, because ComfyUI lists adapters by file name. model_path: replaces the
    recorded base model, of which only the config is read. dtype: training uses fp32; bf16 halves
    the file and rounds each number to 8 bits.

    Keys are `diffusion_model.<layer>.lora_A.weight` and `.lora_B.weight`. B contains alpha / rank
    (exact if that is a power of two), and there is no alpha: ComfyUI (comfy/lora.py) and diffusers'
    converters take that as scale 1, and the latter fail on an alpha of a fused layer. Raises
    ConfigError for layers that have no name there and for an adapter that does not fit the model.
    """
    entry = read_entry(run)
    file = adapter_file(run)
    out = file.with_name(file.resolve().parent.name + SUFFIX) if out is None else Path(out)
    _check_name(out, file)
    family = family_of(entry)
    path, revision = base_model(entry, model_path, cache_dir)
    family.read_geometry(path, revision)  # refuses what is missing or of another family
    transformer = family.loader.blank_transformer(path, revision)
    scale, trained = read_updates(transformer, file)
    updates = {name: (a.to(dtype), (b * scale).to(dtype)) for name, (a, b) in trained.items()}
    broken = [name for name, pair in updates.items() if not all(x.isfinite().all() for x in pair)]
    if broken:
        raise ConfigError(f"{file} holds values that are not finite, in {first_names(broken)}.")
    places = _find_places(family, transformer, file, updates)
    sizes = {
        name: transformer.get_submodule(name).out_features
        for layers in places.values()
        for name in layers
    }
    tensors = {}
    for original, layers in places.items():
        a, b = _stack(layers, sizes, updates)
        tensors |= {_key(original, "A"): a, _key(original, "B"): b}
    with replacing(out) as temporary:
        save_tensors(temporary, tensors, entry)
        _check_written(temporary, places, sizes, updates)
    note = RopePolicy.recorded(entry).stock_note("ComfyUI applies")
    if note is not None:
        log.warning(note)
    return out


def _check_name(out: Path, file: Path) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"out={out} must end in .safetensors.")
    if out.name.endswith(WEIGHTS) or (out.exists() and out.samefile(file)):
        raise ConfigError(f"out={out} is the name of an adapter for diffusers; take another.")


def _find_places(
    family: ModelFamily, transformer: Any, file: Path, layers: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Return the original layers that hold the given ones, each with all layers that it stacks.

    Raises ConfigError for layers that no original one holds.
    """
    holders = {name: _holders(family, name) for name in layers}
    homeless = [name for name, found in holders.items() if not found]
    if homeless:
        known = [part for parts in family.layers.original.values() for part in parts]
        raise ConfigError(
            f"{file} cannot be exported: the names in ComfyUI's model are not known for "
            f"{first_names(homeless)}. Use it in diffusers, or train with other lora.targets, such "
            f"as {' or '.join(family.layers.lora_targets)}. Layers that can be exported: "
            f"{first_names(known, len(known))}."
        )
    modules = dict(transformer.named_modules())
    places: dict[str, tuple[str, ...]] = {}
    for name, found in holders.items():
        assert len(found) == 1, f"{name} is a part of {', '.join(found)} in `layers.original`"
        for original, parts in found.items():
            unknown = [part for part in parts if part not in modules]
            assert not unknown, f"{original} in `layers.original` holds {unknown}: no such layers"
            places[original] = parts
    return places


def _holders(family: ModelFamily, layer: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for original, parts in family.layers.original.items():
        for part in parts:
            match = re.fullmatch(re.escape(part).replace(r"\{\}", r"(\d+)"), layer)
            if match:
                found[original.format(*match.groups())] = tuple(
                    other.format(*match.groups()) for other in parts
                )
    return found


def _key(original: str, matrix: str) -> str:
    return f"{PREFIX}{original}.lora_{matrix}.weight"


def _stack(
    layers: tuple[str, ...], sizes: Mapping[str, int], updates: Updates
) -> tuple[Tensor, Tensor]:
    """Return one A and B for layers whose outputs are consecutive and whose input is shared.

    The ranks add up and B is block-diagonal: its rows for a layer without an update are zeros.
    """
    present = [updates[name] for name in layers if name in updates]
    blocks = [
        updates[name][1] if name in updates else present[0][1].new_zeros(sizes[name], 0)
        for name in layers
    ]
    return torch.cat([a for a, _ in present]), torch.block_diag(*blocks)


def _check_written(
    file: Path,
    places: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    updates: Updates,
) -> None:
    """Raise RuntimeError unless the file holds every layer's update bit by bit, and nothing else.

    An update is the sum of its rank-one terms, so only terms that are not zero are compared.
    """
    tensors, _ = read_tensors(file)
    wrong = tensors.keys() ^ {_key(original, x) for original in places for x in "AB"}
    if not wrong:
        written = {}
        for original, layers in places.items():
            a, b = tensors[_key(original, "A")], tensors[_key(original, "B")]
            rows = b.split([sizes[name] for name in layers])
            written |= {name: _terms(a, x) for name, x in zip(layers, rows, strict=True)}
        wrong = updates.keys() - written.keys()
        for name, terms in written.items():
            if name not in updates:
                same = not terms[0].numel()
            else:
                same = all(map(torch.equal, terms, _terms(*updates[name])))
            if not same:
                wrong.add(name)
    if wrong:
        raise RuntimeError(
            f"The file written to {file.parent} is not the adapter; it differs in "
            f"{first_names(sorted(wrong))}. It was removed. Either longreel has a bug or the disk "
            "fails."
        )


def _terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of A and columns of B that contribute to their product."""
    used = b.ne(0).any(dim=0)
    return a[used], b[:, used]
