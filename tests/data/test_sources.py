"""Tables with times and scores, OpenVid-1M and `datasets` are listed, filtered and ranked."""

import errno
import json
import sys
from pathlib import Path

import pytest
from videos import steady

from longreel.data.listing import SourceSpec
from longreel.data.sources import SOURCES, list_videos


def listing(folder, **options):
    return list_videos(SourceSpec(path=str(folder), **options))


def write_rows(folder, *rows, name="metadata.jsonl"):
    folder.mkdir(exist_ok=True)
    for row in rows:
        (folder / row.get("file_name", row.get("video"))).touch()
    if name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(list(rows)), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet"])
def test_a_video_may_have_several_rows_with_times(tmp_path, name):
    folder = write_rows(
        tmp_path / "v",
        {"video": "a.mp4", "caption": "one", "start": 0.0, "end": 2.5, "score": 3.0},
        {"video": "a.mp4", "caption": "two", "start": 2.5, "end": None, "score": 4.0},
        {"video": "a.mp4", "caption": "again", "start": 2.5, "end": None, "score": 5.0},
        name=name,
    )
    found = listing(folder)
    assert [(s.caption, s.start, s.end) for s in found.sources] == [
        ("one", 0.0, 2.5),
        ("two", 2.5, None),
    ]
    assert [item.kind for item in found.dropped] == ["repeated"]
    assert found.sources[1].columns["score"] == 4.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"start": 3, "end": 2}, "metadata.jsonl line 1: end=2 is not after start=3"),
        ({"start": -1}, "start=-1 is not a time in seconds"),
        ({"end": "soon"}, "end='soon' is not a time in seconds"),
    ],
)
def test_impossible_times_are_refused_by_line(tmp_path, row, message):
    folder = write_rows(tmp_path / "v", {"file_name": "a.mp4", "caption": "x", **row})
    with pytest.raises(ValueError, match=message):
        listing(folder)


def test_files_that_are_no_parquet_are_refused(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="metadata.parquet is not valid Parquet"):
        listing(tmp_path)


def test_a_caption_beside_a_file_of_an_unknown_extension_is_told(tmp_path):
    for name in ("a.mp4", "a.txt", "b.mp5", "b.txt", "notes.txt", "c.json"):
        (tmp_path / name).write_text("words")
    found = listing(tmp_path)
    assert [source.name for source in found.sources] == ["a.mp4"]
    (dropped,) = found.dropped
    assert (dropped.name, dropped.kind) == ("b.mp5", "no video extension")
    assert dropped.reason.startswith(".mp5 is not among .avi, ")


@pytest.mark.parametrize("file_name", ["../b.mp4", "/etc/b.mp4", "x/../../b.mp4"])
def test_paths_outside_the_folder_are_refused(tmp_path, file_name):
    (tmp_path / "b.mp4").touch()
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "a.mp4").touch()
    (folder / "a.txt").write_text("inside")
    row = {"file_name": file_name, "caption": "outside"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    found = listing(folder)
    assert [source.name for source in found.sources] == ["a.mp4"]
    assert [item.kind for item in found.dropped] == ["outside the folder"]


def test_absolute_paths_within_the_folder_and_columns_of_other_names(tmp_path):
    row = {"clip": str(tmp_path / "a.mp4"), "words": "a dog"}
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (source,) = listing(tmp_path, video="clip", caption="words").sources
    assert (source.name, source.caption) == ("a.mp4", "a dog")
    with pytest.raises(ValueError, match="line 1 has no file_name"):
        listing(tmp_path)


SCORES = [("a", 5.5, 4), ("b", 5.5, 2), ("c", 6.5, 9), ("d", None, 9), ("e", 4.0, 4)]


@pytest.fixture
def scored(tmp_path):
    rows = ({"file_name": f"{n}.mp4", "caption": n, "look": x, "move it": y} for n, x, y in SCORES)
    return write_rows(tmp_path / "v", *rows)


def kept(found) -> str:
    return "".join(source.caption for source in found.sources)


def test_filter(scored):
    found = listing(scored, filter='look > 5.2 and "move it" > 3')
    assert kept(found) == "ac"
    reasons = {item.name: item.reason for item in found.dropped}
    assert reasons["b.mp4"] == "data.filter: look is 5.5, move it is 2"
    assert reasons["d.mp4"] == "data.filter: look is missing, move it is 9"
    assert {item.kind for item in found.dropped} == {"filtered"}
    with pytest.raises(ValueError, match="no column 'lok'. Did you mean 'look'"):
        listing(scored, filter="lok > 5")
    assert kept(listing(scored, filter="caption contains 'A'")) == "a"


def test_top_k(scored):
    found = listing(scored, top_k=2, top_by="look")
    assert kept(found) == "ac"  # equal scores: the first by name
    reasons = {item.name: item.reason for item in found.dropped}
    assert reasons["e.mp4"] == "data.top_k: look 4 is not among the 2 greatest, which end at 5.5"
    assert reasons["d.mp4"] == "data.top_k: look has no number"
    assert kept(listing(scored, top_k=9, top_by="look")) == "abce"
    assert kept(listing(scored, filter="look < 6", top_k=1, top_by="move it")) == "a"
    with pytest.raises(ValueError, match="data.top_by=.*no column 'looks'"):
        listing(scored, top_k=2, top_by="looks")


def test_openvid(tmp_path):
    table = tmp_path / "data" / "train" / "OpenVid-1M.csv"
    table.parent.mkdir(parents=True)
    head = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion"
    table.write_text(
        f"{head},frame,fps,seconds\n"
        "a.mp4,a dog,5.5,4.5,0.99,static,100,25,4\n"
        "b.mp4,a cat,4.5,4.5,0.99,pan_left,100,25,4\n"
        "b.mp4,a cat again,4.5,4.5,0.99,pan_left,100,25,4\n"
        "c.mp4,,5.5,4.5,0.99,static,100,25,4\n"
        "gone1.mp4,x,5.5,4.5,0.99,static,100,25,4\n"
        "gone2.mp4,x,5.5,4.5,0.99,static,100,25,4\n"
    )
    with pytest.raises(ValueError, match="none of the 6 videos .*unpack OpenVid_part"):
        listing(tmp_path, source="openvid")
    (tmp_path / "video").mkdir()
    for name in "abc":
        (tmp_path / "video" / f"{name}.mp4").touch()
    found = listing(tmp_path, source="openvid", filter="aesthetic > 5.2 and motion > 3")
    assert [(source.name, source.caption) for source in found.sources] == [("video/a.mp4", "a dog")]
    assert sorted(item.kind for item in found.dropped) == [
        "filtered",
        "no caption",
        "no such file",
        "repeated",
    ]
    same = listing(tmp_path, source="openvid", filter='"aesthetic score" > 5.2')
    assert kept(same) == kept(found)
    table.unlink()
    with pytest.raises(ValueError, match=r"needs one OpenVid\*.csv in it, and there is none"):
        listing(tmp_path, source="openvid")


@pytest.fixture
def parquet(tmp_path):
    """Make a local copy of a data set whose Parquet file holds the videos' bytes."""
    datasets = pytest.importorskip("datasets")
    paths = [steady(tmp_path / f"{i}.mp4", 12 + i) for i in range(3)]
    rows = [
        {"video": {"bytes": path.read_bytes(), "path": path.name}, "caption": f"clip {i}", "n": i}
        for i, path in enumerate(paths)
    ]
    rows[2]["caption"] = " "
    features = datasets.Features(
        {"video": datasets.Video(decode=False), "caption": datasets.Value("string")}
        | {"n": datasets.Value("int64")}
    )
    folder = tmp_path / "copy"
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder, paths


def test_a_data_set_is_streamed_once_without_its_decoder(parquet, tmp_path, monkeypatch):
    folder, paths = parquet
    options = {"source": "datasets", "cache_dir": str(tmp_path / "cache"), "filter": "n < 1"}
    found = listing(folder, **options)
    (source,) = found.sources
    assert source.caption == "clip 0" and source.name == "000000 0.mp4"
    assert source.path.read_bytes() == paths[0].read_bytes()
    assert sorted(item.kind for item in found.dropped) == ["filtered", "no caption"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert listing(folder, **options) == found  # from the stored list
    with pytest.raises(
        ValueError, match="needs the datasets library: pip install 'longreel.datasets.'"
    ):
        listing(folder, **options, split="test")


def test_a_disk_that_fills_up_while_a_data_set_is_fetched_is_told(parquet, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=f"the disk of cache.dir={tmp_path / 'cache'} is full"):
        listing(parquet[0], source="datasets", cache_dir=str(tmp_path / "cache"))


def test_a_folder_through_datasets_is_used_where_it_is(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "v"
    steady(folder / "a.mp4", 12)
    (folder / "metadata.csv").write_text("file_name,caption\na.mp4,a dog\n")
    (source,) = listing(folder, source="datasets", cache_dir=str(tmp_path / "cache")).sources
    assert source.caption == "a dog" and source.path == folder / "a.mp4"
    assert not (tmp_path / "cache" / "videos").exists()


def test_data_sets_that_cannot_be_loaded_are_refused(tmp_path):
    pytest.importorskip("datasets")
    options = {"source": "datasets", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="datasets cannot load it"):
        listing(tmp_path / "nowhere", **options)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "train.csv").write_text("name,caption\na,b\n")
    with pytest.raises(ValueError, match="data.video: no column of videos .* are name, caption"):
        listing(tmp_path / "v", **options)


def test_a_data_set_that_breaks_off_is_refused_and_nothing_of_it_is_kept(parquet, tmp_path):
    folder, _ = parquet
    (folder / "train.parquet").rename(folder / "train-00000-of-00002.parquet")
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1, and then nothing more")
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"data.path=.* cannot read split train to its end \("):
        listing(folder, source="datasets", cache_dir=str(cache))
    assert not list(cache.glob("lists/*"))


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"data.source=foldr is unknown: .*{', '.join(SOURCES)}"):
        listing(tmp_path, source="foldr")
