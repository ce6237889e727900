"""Files that appear whole or not at all, and the one kind of tensor file that the cache holds."""

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

HEADER = "longreel"  # one metadata key with one JSON: safetensors orders several keys at random
UNREADABLE = (OSError, SafetensorError, KeyError, ValueError)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FULL = (errno.ENOSPC, errno.EDQUOT)
LINES = 10_000  # that are parsed together


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


def read_json_lines(path: Path, *, torn: bool = False) -> Iterator[Any]:
    """The values of a file that holds one a line, with some thousand in memory at a time.

    torn: lines that are no JSON are passed over; else they raise ValueError, as bytes that are not
    UTF-8 do. OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        while lines := list(islice(file, LINES)):
            try:  # in one go, which takes half the time
                values = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
            except ValueError:
                if not torn:
                    raise
                values = _whole(lines)
            yield from values


def _whole(lines: list[bytes]) -> Iterator[Any]:
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


@contextmanager
def told_when_full(cache_dir: Path) -> Iterator[None]:
    """A full disk as a ValueError that names the cache and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ValueError(
            f"the disk of cache.dir={cache_dir} is full ({error.strerror}). What was encoded stays:"
            " make room and run the same command again, and it goes on; or set cache.dir on another"
            " disk."
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a safetensors file with `about` as its header; equal contents give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata={HEADER: json.dumps(about, sort_keys=True)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)  # safetensors' own writing hides the errno of a full disk


def digest(tensors: dict[str, Tensor]) -> str:
    """sha1 of tensors' numbers as they are stored, by order of their names."""
    found = hashlib.sha1(usedforsecurity=False)
    for name in sorted(tensors):
        found.update(_bytes(tensors[name].detach().cpu().contiguous()))
    return found.hexdigest()


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


def read_pinned(
    path: Path, name: str, *, part: tuple[int, int] = (0, 1), pinned: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """(tensor, header), the tensor's bytes read into memory of its own, page-locked if `pinned`.

    part: (i, n) reads the i-th of n parts of its numbers, flat, in the order of the file; all have
    the same length, with zeros after the end. `safe_open` maps a file into memory instead, so that
    the disk is waited for later, where the tensor is used. Raises one of UNREADABLE.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(_exactly(file, bytearray(8)), "little")
        size = os.fstat(file.fileno()).st_size
        if length > size:
            raise ValueError("its header does not fit in the file")
        header = json.loads(_exactly(file, bytearray(length)))
        about = json.loads(header.pop("__metadata__")[HEADER])
        entry = header[name]
        begin, end = entry["data_offsets"]
        if 8 + length + max(e["data_offsets"][1] for e in header.values()) != size:
            raise ValueError("its length is not what its header says")
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
    return tensor.view(entry["shape"]) if part[1] == 1 else tensor, about


def _exactly(file: Any, target: Any) -> Any:
    """Fill `target`; a read may give less than was asked for."""
    view, done = memoryview(target), 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise ValueError("the file ends too early")
        done += got
    return target


def _bytes(tensor: Tensor) -> memoryview:
    content: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(content)
