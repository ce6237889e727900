"""LoRA fine-tuning for long video under sparse attention.

`longreel.kernels`, `sparse`, `trainer`, `data`, `recipes` and `launch` are the folders of the
repository's root, which installing puts into this package.
"""

from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "pyproject.toml").is_file():  # a checkout, installed editable or not: they are there
    __path__.append(str(_ROOT))

__version__ = version("longreel")
