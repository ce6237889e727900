"""Write files completely or not at all, and read and write the cache's tensor files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

# One metadata key that holds one JSON, because safetensors writes several keys in random order.
HEADER = "longreel"
UNREADABLE = (OSError, SafetensorError, KeyError, ValueError)  # errors of a bad tensor file
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
LINES = 10_000  # lines of a JSON Lines file that are parsed together


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it onto `path` at the end of the block.

    Readers see the old file or the new one, never a part. If the block fails, nothing is left.
    The random name separates processes, on any host, that write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json_lines(path: Path, *, torn: bool = False) -> Iterator[Any]:
    """Yield the values of a JSON Lines file, with at most `LINES` of them in memory.

    torn: skip lines that are not JSON, such as one cut off by a kill; otherwise they raise
    ValueError, as do bytes that are not UTF-8. Raises OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        while lines := list(islice(file, LINES)):
            try:  # together, which takes half the time
                values = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
            except ValueError:
                if not torn:
                    raise
                values = _valid_values(lines)
            yield from values


def _valid_values(lines: list[bytes]) -> Iterator[Any]:
    """Yield the values of those lines that are JSON."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


@contextmanager
def explain_full_disk(cache_dir: Path) -> Iterator[None]:
    """Turn the OSError of a full disk into a ValueError that names the cache and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ValueError(
            f"the disk of cache.dir={cache_dir} is full ({error.strerror}). Files that were "
            "written stay: make room and run the same command again, and it goes on; or set "
            "cache.dir on another disk."
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a safetensors file with `header` as its metadata; equal contents give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata={HEADER: json.dumps(header, sort_keys=True)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)  # safetensors' own writer hides the errno of a full disk


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha1 of the tensors' bytes as they are stored, in the order of their names."""
    found = hashlib.sha1(usedforsecurity=False)
    for name in sorted(tensors):
        found.update(_bytes(tensors[name].detach().cpu().contiguous()))
    return found.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """Read the header alone. Raises one of UNREADABLE if the file is missing, torn or foreign.

    Opening the file compares its length with what safetensors' own header says, so a torn file is
    detected without reading its tensors.
    """
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})[HEADER])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, header). Raises one of UNREADABLE, as `read_header` does."""
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[HEADER])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def read_pinned(
    path: Path, name: str, *, part: tuple[int, int] = (0, 1), pinned: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Read (tensor, header) into new memory, page-locked if `pinned`.

    part: (i, n) reads the i-th of n parts of the flat tensor, in the order of the file. All parts
    have the same length; the last is padded with zeros. In contrast, `safe_open` maps the file into
    memory, which delays disk reads until the tensor is used. Raises one of UNREADABLE.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(_exactly(file, bytearray(8)), "little")
        size = os.fstat(file.fileno()).st_size
        if length > size:
            raise ValueError("its header does not fit in the file")
        tensors = json.loads(_exactly(file, bytearray(length)))
        header = json.loads(tensors.pop("__metadata__")[HEADER])
        entry = tensors[name]
        begin, end = entry["data_offsets"]
        if 8 + length + max(e["data_offsets"][1] for e in tensors.values()) != size:
            raise ValueError("its length differs from what its header says")
        dtype = DTYPES[entry["dtype"]]
        numbers = (end - begin) // dtype.itemsize
        each = -(-numbers // part[1])
        first = min(part[0] * each, numbers)
        count = min(each, numbers - first)
        tensor = torch.empty(each, dtype=dtype, pin_memory=pinned)
        tensor[count:] = 0
        target = _bytes(tensor)[: count * dtype.itemsize]
        file.seek(8 + length + begin + first * dtype.itemsize)
        _exactly(file, target)
    return tensor.view(entry["shape"]) if part[1] == 1 else tensor, header


def _exactly(file: Any, target: Any) -> Any:
    """Fill `target` and return it; one read may return fewer bytes than requested."""
    view, done = memoryview(target), 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise ValueError("the file ends too early")
        done += got
    return target


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    content: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(content)
