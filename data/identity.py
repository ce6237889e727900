"""Identify the encoder that made a file of the cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EncoderIdentity:
    """Identifies the encoders of a model by all that may change what they compute.

    family: the model family's name. model: the setting `model.path`. revision: `model.revision`.
    snapshot: name of the folder with the weights; for a model from the Hub that is its commit.
    dtype: of the weights and latents, such as `torch.bfloat16`.
    """

    family: str
    model: str | None
    revision: str | None
    snapshot: str
    dtype: str

    def __str__(self) -> str:
        """Return the form that cache keys hash: changing it would orphan every existing cache."""
        return f"{self.family}:{self.model}@{self.revision}:{self.snapshot}:{self.dtype}"

    @classmethod
    def parse(cls, header: Any) -> EncoderIdentity:
        """Read the `encoder` of a cache file's header; older files hold it as one string.

        Raises ValueError if it is neither.
        """
        try:
            if isinstance(header, dict):
                return cls(**header)
            family, _, rest = header.partition(":")
            model, snapshot, dtype = rest.rsplit(":", 2)
            model, separator, revision = model.rpartition("@")
            if not separator:
                raise ValueError("it names no revision")
            return cls(family, _given(model), _given(revision), snapshot, dtype)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{header!r} does not identify an encoder ({error})") from error


def _given(text: str) -> str | None:
    """Return a setting from its text in the older form, in which None became "None"."""
    return None if text == "None" else text


def header_value(encoder: EncoderIdentity | str) -> dict[str, str | None] | str:
    """Return the JSON form of an encoder's identity or plain name."""
    return encoder if isinstance(encoder, str) else asdict(encoder)
