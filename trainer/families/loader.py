"""A family's model files: where they are, and diffusers objects made from them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.values import ConfigError
from .hub import hub_file
from .names import ModelNames


@dataclass(frozen=True)
class ModelConfigs:
    """Holds the JSON settings of a model: of the pipeline, the transformer and the VAE.

    path: names the model in error messages.
    """

    path: str
    index: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]

    @classmethod
    def from_pipeline(cls, pipe: Any) -> ModelConfigs:
        """Return the settings of a loaded pipeline."""
        return cls(type(pipe).__name__, pipe.config, pipe.transformer.config, pipe.vae.config)


@dataclass(frozen=True)
class Loader:
    """Loads a family's models. `path` is a folder in the layout of the Hub, or a repository there.

    build_tiny: makes a small pipeline of random weights, drawn from torch's global generator, that
        runs on a CPU in seconds. tiny_version: raise it with every change of `build_tiny`.
    text_components: names of the pipeline's tokenizers and text encoders.
    fp32_components: names of the components that stay in fp32 whatever the dtype of the rest.
    """

    names: ModelNames
    build_tiny: Callable[[], Any]
    tiny_version: int
    text_components: tuple[str, ...] = ("tokenizer", "text_encoder")
    fp32_components: tuple[str, ...] = ("vae",)

    def resolve(self, path: str | None, cache_dir: str | Path) -> str:
        """Return the model's folder or repository.

        None stands for the documented repository, and `tiny` for the tiny model, which is built
        once under `cache_dir`. Any other path is returned unchanged.
        """
        if path != "tiny":
            return path or self.names.repository
        folder = Path(cache_dir).absolute() / f"tiny-{self.names.family}-{self.tiny_version}"
        if not folder.is_dir():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"The cache's folder {folder.parent} cannot be made ({error.strerror}): "
                    "name another."
                ) from error
            with tempfile.TemporaryDirectory(prefix=".tiny-", dir=folder.parent) as temporary:
                finished = Path(temporary) / folder.name
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    self.build_tiny().save_pretrained(finished)
                try:
                    os.replace(finished, folder)
                except OSError:
                    if not folder.is_dir():  # otherwise another process was faster
                        raise
        return str(folder)

    def read_configs(self, path: str, revision: str | None = None) -> ModelConfigs:
        """Read the model's settings; raise ConfigError if files are missing or the pipeline is of
        another class."""
        files = ("model_index.json", "transformer/config.json", "vae/config.json")
        configs = ModelConfigs(path, *(self.read_json(path, revision, file) for file in files))
        if configs.index["_class_name"] != self.names.pipeline:
            raise ConfigError(
                f"{path} holds a {configs.index['_class_name']}; family={self.names.family} covers "
                f"{self.names.pipeline} only, such as {self.names.repository}."
            )
        return configs

    def read_json(self, path: str, revision: str | None, file: str) -> dict[str, Any]:
        """Read one of the model's JSON files; raise ConfigError if it is missing."""
        with self.reading(path):
            if Path(path).is_dir():
                where = Path(path) / file
            elif path.startswith(("/", ".", "~")):
                raise FileNotFoundError("there is no such folder.")
            else:
                where = Path(hub_file(path, revision, file))
            return json.loads(where.read_text())

    def load_transformer(self, path: str, revision: str | None, dtype: torch.dtype) -> Any:
        """Load the transformer in `dtype`, except for parameters that diffusers keeps in fp32."""
        with self.reading(path):
            return self.names.transformer_class.from_pretrained(
                path, subfolder="transformer", revision=revision, dtype=dtype
            )

    def blank_transformer(self, path: str, revision: str | None) -> Any:
        """Build the transformer on the meta device from its config: names and shapes only."""
        with self.reading(path), torch.device("meta"):
            cls = self.names.transformer_class
            config = cls.load_config(path, subfolder="transformer", revision=revision)
            return cls.from_config(config)

    def load_pipeline(
        self,
        path: str,
        revision: str | None,
        *,
        transformer: Any = None,
        text: bool = True,
        vae: bool = True,
        dtype: torch.dtype,
    ) -> Any:
        """Load the stock pipeline around `transformer`, in `dtype` except for `fp32_components`.

        text, vae: load the text encoders with their tokenizers, and the VAE. Components that are
        not loaded are None, and their files are not read.
        """
        components: dict[str, Any] = {"transformer": transformer}
        with self.reading(path):
            if text:
                components |= self.load_tokenizers(path, revision)
            else:
                components |= dict.fromkeys(self.text_components)
            if not vae:
                components["vae"] = None
            fp32 = dict.fromkeys(self.fp32_components, torch.float32)
            return self.names.pipeline_class.from_pretrained(
                path, revision=revision, dtype={"default": dtype, **fp32}, **components
            )

    def load_tokenizers(self, path: str, revision: str | None) -> dict[str, Any]:
        """Load, by component, the tokenizers that the pipeline itself would load wrongly."""
        return {}

    def caption_tokenizer(self, path: str, revision: str | None) -> Any:
        """Load the tokenizer in whose tokens the length of captions is limited."""
        from transformers import AutoTokenizer

        with self.reading(path):
            own = self.load_tokenizers(path, revision).get("tokenizer")
            return own or AutoTokenizer.from_pretrained(
                path, subfolder="tokenizer", revision=revision or "main"
            )

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Turn the many errors for missing files into one ConfigError with the remedy."""
        try:
            yield
        except Exception as error:  # the Hub's client has exception classes of its own
            if not isinstance(error, OSError) and "huggingface_hub" not in type(error).__module__:
                raise
            reason, repository = str(error).strip().splitlines()[0], self.names.repository
            local = f"models/{repository.rpartition('/')[2]}"
            raise ConfigError(
                f"model.path={path} cannot be loaded: {reason}\n"
                f"Fetch the model once with `hf download {repository} --local-dir {local}` "
                f"and set model.path={local} (model={local} for `longreel sample`, `export` and "
                "`cache show`); it takes any local folder in the layout of the Hub "
                "(model_index.json, transformer/, vae/, text_encoder/, ...), a repository, or "
                "`tiny`."
            ) from error
