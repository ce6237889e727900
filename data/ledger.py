"""What is known of files, so that 100,000 of them need not be opened at every start.

    <cache>/ledger/<any name>.jsonl    a fact a line: [kind, key, value]

Each process appends to a file of its own, and no lock is needed: facts are true whoever found them.
The ledger is never the truth itself. A fact names the size and time of the file that it is about, a
line torn by a kill is passed over, and without the folder everything is found out again.
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
MOST_FILES = 8  # more are merged at the end of a build
IN_USE = 3600  # seconds since a file was written to, in which its process may go on with it

Stamp = tuple[int, int, int]
Facts = dict[str, dict[str, Any]]


def stamp(path: str | Path) -> Stamp:
    """Size, and the times of the last change of content and of anything, in ns."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


class Ledger:
    """The facts of a cache; a value is plain JSON."""

    def __init__(self, cache_dir: Path) -> None:
        self.folder = cache_dir / FOLDER
        self._facts: Facts = {}
        self._file: TextIO | None = None
        self._writing = threading.Lock()
        self.reload()

    def get(self, kind: str, key: str) -> Any:
        """The newest value, None if there is none."""
        return self._facts.get(kind, {}).get(key)

    def put(self, kind: str, key: str, value: Any) -> None:
        """Remember, and append to this process's file."""
        with self._writing:
            self._facts.setdefault(kind, {})[key] = value
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                name = self.folder / f"{uuid.uuid4().hex}.jsonl"
                self._file = name.open("w", encoding="utf-8", buffering=1)
            self._file.write(json.dumps([kind, key, value]) + "\n")

    def reload(self) -> None:
        """Take in what other processes have written."""
        _add(self._facts, self._paths())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self) -> None:
        """Put files that nobody writes to any more into one, if they are many."""
        self.close()
        done = time.time_ns() - IN_USE * 10**9
        old = {path: written for path, written in self._paths().items() if written < done}
        if len(old) <= MOST_FILES:
            return
        facts: Facts = {}
        _add(facts, old)  # again: others may have come in since they were read
        newest = max(old.values())
        with replacing(self.folder / f"{uuid.uuid4().hex}.jsonl") as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                for kind, values in facts.items():
                    file.writelines(json.dumps([kind, key, values[key]]) + "\n" for key in values)
            os.utime(temporary, ns=(newest, newest))  # its facts are no newer than they were
        for path in old:
            path.unlink(missing_ok=True)

    def _paths(self) -> dict[Path, int]:
        """All files with the times of their last change in ns, the newest last."""
        written = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError):
                written[path] = path.stat().st_mtime_ns
        return dict(sorted(written.items(), key=lambda item: item[1]))


def _add(facts: Facts, paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another process has merged it
            for fact in read_json_lines(path, torn=True):
                if isinstance(fact, list) and len(fact) == 3:
                    kind, key, value = fact
                    facts.setdefault(kind, {})[key] = value
