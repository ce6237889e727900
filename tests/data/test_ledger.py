"""What is known of files: the newest fact counts, and only files that are done with are merged."""

import os
import time

from longreel.data.ledger import IN_USE, MOST_FILES, Ledger


def age(cache, seconds: float) -> None:
    """All files as if written so long before."""
    for path in (cache / "ledger").iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def write(cache, key: str, value: object) -> None:
    ledger = Ledger(cache)
    ledger.put("file", key, value)
    ledger.close()


def test_the_newest_fact_counts_whatever_the_files_are_called(tmp_path):
    for value in range(8):  # names are random: in their order this would rarely come out
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
