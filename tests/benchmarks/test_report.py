"""Result files that a later run goes on with."""

import pytest
from lib.report import resumed, split_sections, with_sections, write

HEAD = ["# Attention", "one machine, one setting", "ceiling"]
SECTIONS = {"a": "12 tokens\n\n| x |\n|---|\n| 1 |\n\nCounts.", "b": "| x |\n|---|"}


def test_sections_come_back():
    text = with_sections(HEAD, SECTIONS)
    assert split_sections(text) == (HEAD, SECTIONS)
    assert text.startswith("# Attention\n\none machine") and text.endswith("|---|\n")
    assert split_sections(with_sections(HEAD, {})) == (HEAD, {})


def test_resumed(tmp_path):
    path = tmp_path / "results" / "today.md"
    assert resumed(path, HEAD[1]) == ([], {})
    write(path, with_sections(HEAD, SECTIONS))
    assert resumed(path, HEAD[1]) == (HEAD, SECTIONS)
    with pytest.raises(SystemExit, match="there: one machine, one setting\nhere:  another"):
        resumed(path, "another")


def test_nothing_is_left_beside_a_written_file(tmp_path):
    write(tmp_path / "today.md", "old")
    write(tmp_path / "today.md", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("today.md", "new")]
