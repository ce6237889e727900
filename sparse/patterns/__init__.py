"""Sparse attention patterns by the names that recipes use."""

from .base import SparsePattern
from .dense import Dense
from .radial import Radial

PATTERNS: dict[str, type] = {"dense": Dense, "radial": Radial}


def pattern_name(pattern: SparsePattern) -> str:
    """The name under which a pattern's class stands in `PATTERNS`."""
    for name, cls in PATTERNS.items():
        if type(pattern) is cls:
            return name
    raise ValueError(f"{type(pattern).__name__} is not in PATTERNS: {', '.join(PATTERNS)}.")


__all__ = ["PATTERNS", "Dense", "Radial", "SparsePattern", "pattern_name"]
