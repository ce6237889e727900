"""RMS norm and rotary position embedding of queries or keys in one pass over memory."""

from .op import norm_rope
from .reference import rotate

__all__ = ["norm_rope", "rotate"]
