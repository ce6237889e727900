"""List OpenVid-1M in the layout of its authors (Nan et al., 2024, arXiv 2407.02371).

    <path>/data/train/OpenVid-1M.csv    or OpenVidHD.csv, or any OpenVid*.csv
    <path>/video/*.mp4                  unpacked from OpenVid_part*.zip

Its columns are video, caption, aesthetic score, motion score, temporal consistency score, camera
motion, frame, fps and seconds. Scores also have short names: aesthetic, motion, temporal
consistency.
"""

from __future__ import annotations

import posixpath
from pathlib import Path

from .folder import check_folder, suffix, visible_files
from .listing import VIDEO_SUFFIXES, Dropped, Listing, Source, SourceSpec
from .tables import first_text, read_rows

SHORT = {
    "aesthetic score": "aesthetic",
    "motion score": "motion",
    "temporal consistency score": "temporal consistency",
}


def list_openvid(spec: SourceSpec) -> Listing:
    """List the rows whose videos exist; the other rows are reported together, by their number.

    Raises ValueError if the table or all videos are missing.
    """
    folder = Path(spec.path)
    check_folder(folder)
    files = visible_files(folder)
    tables = [
        n for n in files if n.rpartition("/")[2].startswith("OpenVid") and suffix(n) == ".csv"
    ]
    if len(tables) != 1:
        found = f"{len(tables)}: {', '.join(tables)}" if tables else "none"
        raise ValueError(
            f"{folder}: data.source=openvid needs one OpenVid*.csv in it, and there is {found}. "
            "Download it with `hf download nkp37/OpenVid-1M data/train/OpenVid-1M.csv --repo-type "
            "dataset --local-dir FOLDER` and unpack OpenVid_part*.zip into FOLDER/video."
        )
    videos = {posixpath.basename(n): n for n in files if suffix(n) in VIDEO_SUFFIXES}
    names, captions = (spec.video or "video",), spec.caption_columns
    rows: dict[str, Source] = {}
    absent, dropped = 0, []
    for line, row in read_rows(folder / tables[0], names):
        place = f"{tables[0]} line {line}"
        name = videos.get(posixpath.basename(first_text(row, names)))
        if name is None:
            absent += 1
            continue
        caption = first_text(row, captions)
        if name in rows:
            reason = f"{place} repeats it; the first row is used"
            dropped.append(Dropped(name, "repeated", reason))
        elif not caption:
            dropped.append(Dropped(name, "no caption", f"{place} has none"))
        else:
            columns = row | {short: row.get(long) for long, short in SHORT.items() if long in row}
            rows[name] = Source(folder / name, caption, name, columns=columns)
    if not rows:
        raise ValueError(
            f"{folder}: none of the {absent} videos in {tables[0]} is there: unpack "
            f"OpenVid_part*.zip into {folder / 'video'}"
        )
    if absent:
        what = f"{absent} rows name videos that are not in {folder}"
        dropped.append(Dropped(tables[0], "no such file", what))
    sources = [rows[name] for name in sorted(rows)]
    return Listing(str(folder), sources, sorted(dropped, key=lambda item: item.name))
