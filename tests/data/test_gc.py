"""Files that no recent run uses are found and deleted."""

import os
import time

import pytest
from stub_cache import SPEC, add, build, never

from longreel.data.gc import find_unused


def test_files_of_recent_runs_are_kept(folder, cache):
    first = build(folder, SPEC, cache)
    (folder / "deep" / "c.mp4").unlink()
    add(folder, "b.mp4", 30, "another cat")
    build(folder, SPEC, cache)
    unused = find_unused(cache)
    # The clip of c.mp4 and the caption that b.mp4 had before; b.mp4 itself is the same.
    assert set(unused.files) == {first.entries[2].latents, first.entries[1].text}
    assert unused.size == sum(path.stat().st_size for path in unused.files)
    assert [manifest.about["where"] for manifest in unused.recent] == [str(folder)]
    assert unused.old == 0
    unused.delete()
    assert find_unused(cache).files == []
    build(folder, SPEC, cache, never)


def test_files_of_old_runs_go_with_their_manifests(folder, cache):
    build(folder, SPEC, cache)
    for path in (cache / "manifests").iterdir():
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    unused = find_unused(cache)
    assert (unused.recent, unused.old) == ([], 1)
    assert {path.suffix for path in unused.files} == {".safetensors", ".jsonl"}
    assert len(find_unused(cache, days=50).recent) == 1


def test_refusals(folder, cache):
    with pytest.raises(ValueError, match="days=-1 must not be negative"):
        find_unused(cache, days=-1)
    cache.mkdir()
    with pytest.raises(ValueError, match="has no manifest"):
        find_unused(cache)
