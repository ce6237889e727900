"""The newest fact counts, and only ledger files that nobody writes to are merged."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from stub_cache import SPEC, build, never

from longreel.data.ledger import IN_USE, MOST_FILES, Ledger


def age(cache, seconds: float) -> None:
    """Make all files `seconds` older."""
    for path in (cache / "ledger").iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def write(cache, key: str, value: object) -> None:
    ledger = Ledger(cache)
    ledger.put("file", key, value)
    ledger.close()


def test_the_newest_fact_counts_whatever_the_files_are_called(tmp_path):
    for value in range(8):  # file names are random, so their order would rarely give this result
        age(tmp_path, 10) if value else None
        write(tmp_path, "a.mp4", value)
    assert Ledger(tmp_path).get("file", "a.mp4") == 7


def test_only_files_that_nobody_writes_to_are_merged_and_nothing_is_lost(tmp_path):
    for index in range(MOST_FILES + 2):
        write(tmp_path, f"{index}.mp4", index)
        write(tmp_path, "again.mp4", index)
        age(tmp_path, 10)
    early = Ledger(tmp_path)
    early.merge()
    assert len(list((tmp_path / "ledger").iterdir())) == 2 * (MOST_FILES + 2)  # all in use
    write(tmp_path, "late.mp4", "not known to `early`")
    age(tmp_path, IN_USE)
    running = Ledger(tmp_path)
    running.put("file", "now.mp4", 1)
    early.merge()
    assert len(list((tmp_path / "ledger").iterdir())) == 2
    running.put("file", "then.mp4", 2)
    after = Ledger(tmp_path)
    names = [*(f"{index}.mp4" for index in range(MOST_FILES + 2)), "again.mp4"]
    assert [after.get("file", name) for name in names] == [*range(MOST_FILES + 2), MOST_FILES + 1]
    assert after.get("file", "late.mp4") == "not known to `early`"
    assert [after.get("file", name) for name in ("now.mp4", "then.mp4")] == [1, 2]
    merged = min((tmp_path / "ledger").iterdir(), key=lambda path: path.stat().st_mtime)
    assert time.time() - merged.stat().st_mtime > IN_USE  # as old as its facts


def content_of_ledger(cache: Path) -> set[str]:
    paths = (cache / "ledger").iterdir()
    return {line for p in paths for line in p.read_text(errors="replace").splitlines()}


@pytest.mark.parametrize("damage", ["gone", "torn", "garbage"])
def test_the_ledger_is_made_again(folder, cache, damage):
    first = build(folder, SPEC, cache)
    for path in (cache / "ledger").iterdir():
        content = path.read_bytes()
        torn = {"torn": content[: len(content) // 2], "garbage": b"\xff{}\n[1]\n"}
        path.unlink() if damage == "gone" else path.write_bytes(torn[damage])
    shutil.rmtree(cache / "manifests")
    assert build(folder, SPEC, cache, never).entries == first.entries
    before = content_of_ledger(cache)
    shutil.rmtree(cache / "manifests")
    assert build(folder, SPEC, cache, never).entries == first.entries
    assert content_of_ledger(cache) == before and len(before) >= 3


def test_a_fault_is_not_believed_after_an_upgrade_of_the_decoder(folder, cache):
    (folder / "text.mp4").write_text("no video")
    (folder / "text.txt").write_text("a dog")
    assert len(build(folder, SPEC, cache).report.dropped) == 1
    for path in (cache / "ledger").iterdir():
        facts = [json.loads(line) for line in path.read_text().splitlines()]
        for kind, _, value in facts:
            if (
                kind.startswith("video") and value[5]
            ):  # frames, complete, size, cuts, fault, decoder
                value[5:] = ["there is no decoder", "1.0"]
        path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    assert build(folder, SPEC, cache, never).report.dropped[0].reason.startswith("not a readable")


def test_a_disk_that_is_full_for_the_ledger_is_not_blamed_on_the_videos(folder, cache, monkeypatch):
    def full(self, kind, key, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longreel.data.ledger.Ledger.put", full)
    with pytest.raises(ValueError, match="is full"):
        build(folder, SPEC, cache, never)
