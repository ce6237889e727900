"""Captions are found in tables and text files, and everything left out is reported."""

import json

import pytest

from longreel.data.listing import Dropped, Source, SourceSpec
from longreel.data.sources import list_videos


def write(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def scan(folder) -> tuple[list[Source], list[Dropped]]:
    listing = list_videos(SourceSpec(path=str(folder)))
    return listing.sources, listing.dropped


def rows(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def names(sources: list[Source]) -> dict[str, str]:
    return {source.name: source.caption for source in sources}


def test_captions_from_jsonl(tmp_path):
    table = rows(
        {"file_name": "b.mp4", "caption": "  a dog \n"},
        {"file_name": "clips/a.MOV", "text": "ein Käfer", "fps": 24},
    )
    write(tmp_path, {"metadata.jsonl": "\ufeff" + table + "\n\n", "b.mp4": "", "clips/a.MOV": ""})
    sources, dropped = scan(tmp_path)
    assert sources == [
        Source(tmp_path / "b.mp4", "a dog", "b.mp4"),
        Source(tmp_path / "clips/a.MOV", "ein Käfer", "clips/a.MOV"),
    ]
    assert dropped == []


def test_captions_from_csv(tmp_path):
    table = 'caption,file_name\r\n"a dog, running\r\nfast",a.mp4\r\na cat,b.mp4\r\n'
    write(tmp_path, {"metadata.csv": table, "a.mp4": "", "b.mp4": ""})
    sources, dropped = scan(tmp_path)
    assert names(sources) == {"a.mp4": "a dog, running\r\nfast", "b.mp4": "a cat"}
    assert dropped == []


def test_captions_from_text_files_in_nested_folders(tmp_path):
    files = {"z.webm": "", "z.txt": "last\n", "day one/a.b.mkv": "", "day one/a.b.txt": "first"}
    sources, dropped = scan(str(write(tmp_path, files)))
    assert names(sources) == {"day one/a.b.mkv": "first", "z.webm": "last"}
    assert [source.name for source in sources] == ["day one/a.b.mkv", "z.webm"]
    assert dropped == []


def test_a_table_in_a_sub_folder_is_relative_to_it_and_goes_before_text_files(tmp_path):
    table = rows({"file_name": "a.mp4", "caption": "from the table"})
    files = {
        "x/metadata.jsonl": table,
        "x/a.mp4": "",
        "x/a.txt": "beside",
        "y.mp4": "",
        "y.txt": "y",
    }
    sources, _ = scan(write(tmp_path, files))
    assert names(sources) == {"x/a.mp4": "from the table", "y.mp4": "y"}


def test_hidden_files_and_links_that_go_round_are_passed_over(tmp_path):
    files = {"a.mp4": "", "a.txt": "a", "._a.mp4": "", ".cache/b.mp4": "", "notes.md": ""}
    write(tmp_path, files)
    (tmp_path / "loop").symlink_to(tmp_path)
    sources, dropped = scan(tmp_path)
    assert names(sources) == {"a.mp4": "a"} and dropped == []


def test_what_is_left_out_is_told(tmp_path):
    table = rows(
        {"file_name": "a.mp4", "caption": "first"},
        {"file_name": "sub/../a.mp4", "caption": "second"},
        {"file_name": "gone.mp4", "caption": "gone"},
        {"file_name": "../b.mp4", "caption": "elsewhere"},
        {"file_name": "d.mp4", "caption": " "},
    )
    files = {"metadata.jsonl": table, "bin.txt": b"\xff\xfe\xfa", "void.txt": "\n"}
    files |= dict.fromkeys(["a.mp4", "bin.mp4", "d.mp4", "none.mp4", "void.mp4"], "")
    sources, dropped = scan(write(tmp_path, files))
    assert names(sources) == {"a.mp4": "first"}
    by_name = {item.name: item.reason for item in dropped}
    assert by_name.pop("bin.mp4").startswith("bin.txt cannot be read as UTF-8 text (")
    assert by_name == {
        "../b.mp4": f"metadata.jsonl line 4: lies outside {tmp_path}",
        "a.mp4": "metadata.jsonl line 2 repeats metadata.jsonl line 1, whose caption is used",
        "d.mp4": "metadata.jsonl line 5 has none",
        "gone.mp4": "metadata.jsonl line 3: there is no such file",
        "none.mp4": "neither a row in metadata.jsonl, metadata.csv or metadata.parquet "
        "nor a file none.txt",
        "void.mp4": "void.txt is empty",
    }
    assert [item.name for item in dropped] == sorted(item.name for item in dropped)


def test_nothing_captioned_is_not_an_error_here(tmp_path):
    sources, dropped = scan(write(tmp_path, {"a.mp4": ""}))
    assert sources == [] and [type(item) for item in dropped] == [Dropped]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"metadata.jsonl": '{"file_name": "a.mp4"}\n{"file'},
            "metadata.jsonl line 2 is not valid JSON",
        ),
        ({"metadata.jsonl": '\n["a.mp4"]\n'}, "metadata.jsonl line 2 is not a JSON object"),
        ({"metadata.jsonl": '{"caption": "a dog"}\n'}, "metadata.jsonl line 1 has no file_name"),
        (
            {"metadata.csv": "name,caption\na.mp4,a\n"},
            "metadata.csv line 1 names no column file_name or video, but name, caption: ",
        ),
        ({"metadata.csv": "file_name,caption\n,a\n"}, "metadata.csv line 2 has no file_name"),
        (
            {"metadata.csv": "file_name,caption\na.mp4,a dog, running\n"},
            "metadata.csv line 2 has more fields than line 1 has names: put captions with commas",
        ),
        ({"metadata.csv": ""}, "set data.video and data.caption if their columns have other names"),
        ({"metadata.csv": b"file_name,caption\na.mp4,\xff\n"}, "metadata.csv is not UTF-8 text"),
        ({"metadata.csv": "", "metadata.jsonl": ""}, "holds both metadata.jsonl and metadata.csv"),
    ],
)
def test_malformed_tables_are_refused_by_file_and_line(tmp_path, files, message):
    write(tmp_path, {"a.mp4": "", **files})
    with pytest.raises(ValueError) as caught:
        scan(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_folders_without_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing does not exist: point data.path at a folder"):
        scan(tmp_path / "missing")
    file = write(tmp_path, {"a.txt": "a"}) / "a.txt"
    with pytest.raises(ValueError, match=r"a.txt is a file, not a folder: point data.path at"):
        scan(file)
    with pytest.raises(ValueError, match=r"holds no video \(.avi, .gif, .*: point data.path at"):
        scan(tmp_path)
