"""Sparse attention patterns, by the names that recipes use."""

from .banded import Spatial, SpatialTemporal, Temporal
from .base import SparsePattern
from .cube import Cube
from .dense import Dense
from .harmonic import Harmonic
from .longlora import LongLora
from .power import Power
from .radial import Radial
from .sliding_tile import SlidingTile

PATTERNS: dict[str, type] = {
    "dense": Dense,
    "radial": Radial,
    "harmonic": Harmonic,
    "spatial": Spatial,
    "temporal": Temporal,
    "spatial_temporal": SpatialTemporal,
    "power": Power,
    "longlora": LongLora,
    "sliding_tile": SlidingTile,
    "cube": Cube,
}


def pattern_name(pattern: SparsePattern) -> str:
    """Return the name of a pattern's class in `PATTERNS`.

    Raises:
        ValueError: if the class is not registered.
    """
    for name, cls in PATTERNS.items():
        if type(pattern) is cls:
            return name
    raise ValueError(f"{type(pattern).__name__} is not in PATTERNS: {', '.join(PATTERNS)}.")


__all__ = [
    "PATTERNS",
    "Cube",
    "Dense",
    "Harmonic",
    "LongLora",
    "Power",
    "Radial",
    "SlidingTile",
    "SparsePattern",
    "Spatial",
    "SpatialTemporal",
    "Temporal",
    "pattern_name",
]
