"""Model families by the names that recipes use."""

from typing import Any

from ..config.values import ConfigError
from .attention import installed_attention
from .base import ModelFamily
from .geometry import Geometry
from .hunyuan.family import HUNYUAN
from .mochi.family import MOCHI
from .rope import RopePolicy, installed_rope
from .wan.family import WAN

FAMILIES: dict[str, ModelFamily] = {family.name: family for family in (WAN, HUNYUAN, MOCHI)}


def family_of(entry: dict[str, Any]) -> ModelFamily:
    """Return the family that an adapter's entry names; raise ConfigError if it is unknown."""
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
