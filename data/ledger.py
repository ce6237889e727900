"""Remember facts about files, so that a start need not open 100,000 of them.

    <cache>/ledger/<any name>.jsonl    one fact per line: [kind, key, value]

Each process appends to a file of its own, and no lock is needed, because a fact is true whoever
found it. The ledger is only a memory: a fact names the size and times of the file it is about,
lines torn by a kill are skipped, and if the folder is deleted everything is determined again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from .files import read_json_lines, replacing

FOLDER = "ledger"
MOST_FILES = 8  # more files are merged at the end of a build
IN_USE = 3600  # seconds after its last write in which a file may still be written to

Stamp = tuple[int, int, int]
Facts = dict[str, dict[str, Any]]


def stamp(path: str | Path) -> Stamp:
    """Return a file's size in bytes, its mtime and its ctime, both in ns."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


class Ledger:
    """Holds the facts of a cache; values are plain JSON."""

    def __init__(self, cache_dir: Path) -> None:
        self.folder = cache_dir / FOLDER
        self._facts: Facts = {}
        self._file: TextIO | None = None
        self._writing = threading.Lock()
        self.reload()

    def get(self, kind: str, key: str) -> Any:
        """Return the newest value, None if there is none."""
        return self._facts.get(kind, {}).get(key)

    def put(self, kind: str, key: str, value: Any) -> None:
        """Remember a value and append it to this process's file."""
        with self._writing:
            self._facts.setdefault(kind, {})[key] = value
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                name = self.folder / f"{uuid.uuid4().hex}.jsonl"
                self._file = name.open("w", encoding="utf-8", buffering=1)
            self._file.write(json.dumps([kind, key, value]) + "\n")

    def reload(self) -> None:
        """Read what other processes have written."""
        _add(self._facts, self._paths())

    def close(self) -> None:
        """Close this process's file; `put` opens another one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self) -> None:
        """Merge files that no process writes to any more, if there are more than `MOST_FILES`."""
        self.close()
        done = time.time_ns() - IN_USE * 10**9
        old = {path: written for path, written in self._paths().items() if written < done}
        if len(old) <= MOST_FILES:
            return
        facts: Facts = {}
        _add(facts, old)  # read again: other processes may have added facts
        newest = max(old.values())
        with replacing(self.folder / f"{uuid.uuid4().hex}.jsonl") as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                for kind, values in facts.items():
                    file.writelines(json.dumps([kind, key, values[key]]) + "\n" for key in values)
            os.utime(temporary, ns=(newest, newest))  # the facts keep their age
        for path in old:
            path.unlink(missing_ok=True)

    def _paths(self) -> dict[Path, int]:
        """Return all files with their mtimes in ns, the newest last."""
        written = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError):
                written[path] = path.stat().st_mtime_ns
        return dict(sorted(written.items(), key=lambda item: item[1]))


def _add(facts: Facts, paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another process merged it meanwhile
            for fact in read_json_lines(path, torn=True):
                if isinstance(fact, list) and len(fact) == 3:
                    kind, key, value = fact
                    facts.setdefault(kind, {})[key] = value
