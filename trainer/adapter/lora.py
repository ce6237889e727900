"""LoRA adapters: attached to a frozen base, saved for stock diffusers, loaded strictly."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config.values import ConfigError
from ..families.base import ModelFamily

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
ENTRY = "longreel"  # our key in the header of that file
PEFT_CONFIG = "lora_adapter_metadata"  # diffusers' key
ADAPTER = "default"  # PEFT's name for the adapter in training
PREFIX = "transformer."  # of tensor names, for diffusers pipelines


def attach(
    transformer: Any,
    family: ModelFamily,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str | None = None,
    dropout: float = 0.0,
    compute_dtype: str = "float32",
    seed: int = 0,
) -> list[tuple[str, nn.Parameter]]:
    """Freeze the transformer and add an fp32 adapter whose update is zero at first.

    alpha: None for the rank. targets: as for `LayerNames.target_pattern`. compute_dtype: of the
    adapter's products: "float32", or "bfloat16" on a bf16 base. Returns the trainable parameters by
    name, which are only the adapter's. Raises ConfigError if the targets are no regular expression
    or match other than linear layers.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    targets = family.layers.target_pattern(targets)
    lora_alpha: Any = rank if alpha is None else alpha  # PEFT's annotation says int
    check_targets(transformer, targets)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        target_modules=targets,
        lora_dropout=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(transformer, torch.float32)  # PEFT follows the base, which may be bf16
    if compute_dtype == "bfloat16":
        from .bf16_linear import use_bf16_products

        use_bf16_products(transformer)
    return [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]


def check_targets(transformer: Any, targets: str) -> None:
    """Raise ConfigError unless the regex matches layers of the transformer, all of them linear."""
    try:
        matched = [m for name, m in transformer.named_modules() if re.fullmatch(targets, name)]
    except re.error as error:
        raise ConfigError(
            f"lora.targets={targets} is not a regular expression: {error}."
        ) from error
    if not matched or not all(isinstance(module, nn.Linear) for module in matched):
        what = "a module that is not linear" if matched else "no module"
        linear = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        raise ConfigError(
            f"lora.targets={targets} matches {what} of {type(transformer).__name__}. It is a "
            f"regular expression for whole names of linear layers, such as {linear[-1]}."
        )


def state_dict(transformer: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in the saved file.

    tensors: by parameter name, if the transformer itself does not hold them whole.
    """
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, state_dict=tensors, adapter_name=ADAPTER)
    return {PREFIX + name: tensor for name, tensor in state.items()}


def save(
    folder: str | Path,
    transformer: Any,
    family: ModelFamily,
    entry: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter to `folder/pytorch_lora_weights.safetensors`, whole or not at all.

    `pipe.load_lora_weights(folder)` of stock diffusers reads it, alpha included. Equal inputs give
    equal bytes. entry: metadata of the run for the file's header. tensors: as for `state_dict`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = state_dict(transformer, tensors)
    layers = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    config = transformer.peft_config[ADAPTER].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    # For training only: a pipeline that loads an adapter leaves its new dropout layers active.
    config["lora_dropout"] = 0.0
    with tempfile.TemporaryDirectory(prefix=".lora-", dir=folder) as temporary:
        family.names.pipeline_class.save_lora_weights(
            temporary,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=config,
        )
        file = Path(temporary) / WEIGHTS
        _add_metadata(file, ENTRY, json.dumps(entry, sort_keys=True))
        os.replace(file, folder / WEIGHTS)
    return folder / WEIGHTS


@dataclass(frozen=True)
class AdapterWriter:
    """Writes adapters of one run; see `save` for the fields."""

    transformer: Any
    family: ModelFamily
    entry: dict[str, Any]

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Write an adapter to `folder`. tensors: by the names of the transformer's parameters."""
        return save(folder, self.transformer, self.family, self.entry, tensors)


def _add_metadata(file: Path, key: str, value: str) -> None:
    """Add a metadata key to a safetensors file, and sort the keys.

    The library's own writer puts them in an order that varies from run to run.
    """
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__") | {key: value}
    header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + content[8 + size :])
        stream.flush()
        os.fsync(stream.fileno())


def check_fits(transformer: Any, path: str | Path) -> None:
    """Raise ConfigError unless all tensors of the adapter at `path` fit the transformer.

    diffusers loads those that fit, and only warns about the rest. The check reads the file's header
    alone, and works on a transformer on the meta device.
    """
    _fitting_layers(transformer, adapter_file(path))


def read_updates(
    transformer: Any, path: str | Path
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Read an adapter: its scale alpha / rank, and `A [rank, in]` and `B [out, rank]` by layer.

    Raises ConfigError as `check_fits` does; works on a transformer on the meta device.
    """
    file = adapter_file(path)
    config, layers = _fitting_layers(transformer, file)
    tensors = load_file(file)
    updates = {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"])
        for name in layers
    }
    return config["lora_alpha"] / config["r"], updates


def _fitting_layers(transformer: Any, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return PEFT's config in the file and the layers it adapts; raise ConfigError on a misfit."""
    metadata, shapes = _read_header(file)
    config = _peft_config(file, metadata)
    wanted, layers = {}, []
    for name, module in transformer.named_modules():
        if re.fullmatch(config["target_modules"], name):
            layers.append(name)
            wanted[f"{PREFIX}{name}.lora_A.weight"] = (config["r"], module.in_features)
            wanted[f"{PREFIX}{name}.lora_B.weight"] = (module.out_features, config["r"])
    _compare(file, shapes, wanted)
    return config, layers


def _peft_config(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    config = json.loads(metadata.get(PEFT_CONFIG, "{}"))
    config = {key.removeprefix(PREFIX): value for key, value in config.items()}
    if not isinstance(config.get("target_modules"), str):
        raise ConfigError(f"{file} does not record its rank, alpha and targets as longreel does.")
    return config


def _compare(
    file: Path, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {given[name]} for {wanted[name]}"
            for name in sorted(given.keys() & wanted.keys())
            if given[name] != wanted[name]
        ],
    }
    if any(problems.values()):
        lines = [f"{what}: {first_names(names)}" for what, names in problems.items() if names]
        raise ConfigError(
            f"{file} does not fit this model (another model.path, lora.rank or lora.targets?).\n"
            + "\n".join(lines)
        )


def first_names(names: list[str], most: int = 8) -> str:
    """Return the first names, and how many more there are, as text."""
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def read_entry(path: str | Path) -> dict[str, Any]:
    """Read the entry that `save` put into an adapter's file; raise ConfigError if it has none."""
    file = adapter_file(path)
    metadata, _ = _read_header(file)
    if ENTRY not in metadata:
        raise ConfigError(
            f"{file} was not written by longreel: its header has no `{ENTRY}` entry. Load it with "
            "`pipe.load_lora_weights` of diffusers."
        )
    entry = json.loads(metadata[ENTRY])
    if entry["version"] not in (1, 2):
        raise ConfigError(
            f"{file} was written by a newer longreel (entry version {entry['version']})."
        )
    return entry


def adapter_file(path: str | Path) -> Path:
    """Return the adapter file at `path`, a file or its folder; raise ConfigError if none is."""
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if file.is_file():
        return file
    below = sorted(str(found) for found in path.glob(f"**/{WEIGHTS}"))
    hint = f" Below it: {first_names(below)}." if below else ""
    raise ConfigError(f"{path} holds no adapter ({WEIGHTS}).{hint}")


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return a file's metadata, and the shape of each tensor by name."""
    try:
        with safe_open(file, framework="pt") as content:
            names = content.keys()
            shapes = {name: tuple(content.get_slice(name).get_shape()) for name in names}
            return content.metadata() or {}, shapes
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error
