"""Files that appear whole or not at all, and the one kind of tensor file that the cache holds."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEADER = "longreel"  # one metadata key with one JSON: safetensors orders several keys at random
UNREADABLE = (OSError, SafetensorError, KeyError, ValueError)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it onto `path` at the end of the block.

    Readers see the old file or the new one, never a part; if the block fails, nothing is left.
    The random name keeps processes on several hosts that write the same file apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a safetensors file with `about` as its header; equal contents give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER: json.dumps(about, sort_keys=True)})


def read_about(path: Path) -> dict[str, Any]:
    """The header alone; one of UNREADABLE if the file is missing, torn or not ours.

    A torn file is found out too: opening it compares its length with what its header promises.
    """
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})[HEADER])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header); one of UNREADABLE as for `read_about`."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[HEADER])
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
