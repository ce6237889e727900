"""Model families by the names that recipes use."""

from typing import Any

from ..config.values import ConfigError
from .base import Geometry, ModelFamily, installed_attention
from .hunyuan.family import Hunyuan
from .mochi.family import Mochi
from .rope import RopePolicy, installed_rope
from .wan.family import Wan

FAMILIES: dict[str, ModelFamily] = {family.name: family for family in (Wan(), Hunyuan(), Mochi())}


def family_of(entry: dict[str, Any]) -> ModelFamily:
    """The family that an adapter's entry names; ConfigError for one this version does not know."""
    if entry["family"] not in FAMILIES:
        raise ConfigError(
            f"The adapter is of family {entry['family']}; this longreel knows "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[entry["family"]]


__all__ = [
    "FAMILIES",
    "Geometry",
    "ModelFamily",
    "RopePolicy",
    "family_of",
    "installed_attention",
    "installed_rope",
]
