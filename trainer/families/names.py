"""Name a family and its published model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelNames:
    """Holds a family's key in recipes and the names of its model at diffusers and on the Hub.

    family: the value of `family=`. pipeline, transformer: diffusers classes. repository: the
    documented model on the Hub, which `model.path` defaults to.
    """

    family: str
    pipeline: str
    transformer: str
    repository: str

    @property
    def pipeline_class(self) -> Any:
        return diffusers_class(self.pipeline)

    @property
    def transformer_class(self) -> Any:
        return diffusers_class(self.transformer)


def diffusers_class(name: str) -> Any:
    """Return a diffusers class. Importing its module takes seconds, so this waits until one is
    needed."""
    import diffusers

    return getattr(diffusers, name)
