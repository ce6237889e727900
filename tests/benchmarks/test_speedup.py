"""Rows as tables, ratios and plots, from numbers that are known."""

import pytest
from lib import speedup
from lib.parts import PARTS, Profile
from lib.rows import Point
from lib.speedup import Record, Results, Section

from longreel.trainer.plan.estimate import GIB

H200 = "NVIDIA H200, torch 2"
PER_BLOCK = {"dual dense": 5.0, "dual sparse": 1.5, "single dense": 5.0, "single sparse": 1.25}


def record(dense=2, offload=False, fixed=4.0, frames=253):
    """20 dual and 40 single blocks, `dense` of the first dense (60: all), measured at 1 and 2."""
    whole = {"dual dense": dense, "dual sparse": 20 - dense, "single sparse": 40}
    if dense == 60:
        whole = {"dual dense": 20, "single dense": 40}
    row = Record("as told", "`made`", "hunyuan", frames, 1000, 0.22, offload, whole, 1, 2)
    for counts in row.design.points:
        seconds = fixed + sum(PER_BLOCK[kind] * n for kind, n in counts.items())
        blocks = sum(counts.values())
        parts = dict.fromkeys(PARTS, 0.0) | {"attention": seconds - fixed, "idle": fixed}
        kernels = {"add | add | bf16[4]": ("element-wise", 3 * blocks, 0.5 * blocks)}
        if "dual dense" in counts:
            kernels["sdpa | cudnn | "] = ("attention", 1, 4.0 * counts["dual dense"])
        # Two stray steps, which a median leaves out only together.
        times = [seconds, seconds + 1, seconds - 1]
        held, peak = blocks * GIB, (30 + 3 * blocks) * GIB
        row.points.append(Point(counts, times, held, peak, Profile(parts, kernels)))
    return row


def test_a_row_is_extrapolated():
    row = record()
    assert row.seconds == 4 + 2 * 5 + 18 * 1.5 + 40 * 1.25
    assert row.per_block == {k: v for k, v in PER_BLOCK.items() if k in row.whole}
    assert row.parts and row.parts["attention"] == row.seconds - 4 and row.parts["idle"] == 4
    assert row.peak == (30 + 3 * 60) * GIB
    # Offloaded, further blocks add what they hold, not what they keep.
    assert record(offload=True).peak == (30 + 3 * 3 + 57) * GIB
    add, sdpa = row.kernels()
    assert add == ("add | add | bf16[4]", "element-wise", 180, 30)
    assert sdpa[1:] == ("attention", 1, 8)


def test_ratios_and_verdict():
    rows = {"dense": record(60, fixed=44), "fair": record(60, fixed=44), "radial": record()}
    assert rows["dense"].seconds == 344
    text = speedup.ratios(rows)
    assert f"radial over fair: {344 / 91:.2f}x" in text
    assert "extrapolated from 1 and 2 of each to 2 dual dense, 18 dual sparse, 40 single" in text
    assert "dual 3.33x, single 4.00x" in text
    rows["stock"] = record(60, fixed=300)
    assert speedup.verdict("hunyuan_2x", rows, H200) == (
        "stock takes 600.0 s, not within 5% of the 537 s known. "
        "dense takes 344.0 s, within 5% of the 344 s known."
    )
    assert speedup.verdict("hunyuan_2x memory.offload=true", rows, H200)
    assert not speedup.verdict("hunyuan_2x", rows, "NVIDIA A100, torch 2")
    assert not speedup.verdict("mochi_2x", rows, H200)


def test_numbers_survive_the_file(tmp_path):
    path = tmp_path / "step.json"
    failed = record()
    failed.complaint = "out of memory | of all"
    section = Section("Before timing: right.", {"radial": record(), "fair": failed})
    results = Results(H200, {"hunyuan_2x": section})
    speedup.save(results, path, "# Title")
    assert speedup.read(path, H200) == results
    with pytest.raises(SystemExit, match="measured with another setup"):
        speedup.read(path, "another")
    text = path.with_suffix(".md").read_text()
    assert "| fair | out of memory / of all |" in text
    assert "| radial | 91 | - | 11 | 210.0 |" in text
    assert "| add | add | bf16[4] | element-wise | 180 | 30 | 33.0% |" in text
    assert text.count("Longest kernel: add. `made`") == 1
    assert sorted(x.suffix for x in tmp_path.iterdir()) == [".json", ".md", ".svg"]


def test_plot(tmp_path):
    rows = {"radial": record(frames=125), "fair": record(60, frames=125)}
    longer = {"radial": record(frames=253), "stock": record(60)}
    sections = {"hunyuan_1x": Section("", rows), "hunyuan_2x": Section("", longer)}
    sections["hunyuan_2x memory.offload=true"] = Section("", {"radial": record(offload=True)})
    assert speedup.draw(Results(H200, sections), tmp_path / "step.svg")
    text = (tmp_path / "step.svg").read_text()
    assert text.count("hunyuan, radial") == 1 and text.count("hunyuan, dense") == 1
    assert not speedup.draw(Results(H200), tmp_path / "none.svg")
