"""A clip that processes share, beside a clip on each, over gloo on tiny models."""

import pytest
from processes import finish, start

SMALL = ("blocks=1", "repeats=2", "height=64", "width=64", "sparse.block=16", "lora.rank=4")


@pytest.mark.slow
def test_both_ways_are_compared_and_timed(tmp_path):
    places = (f"out={tmp_path}", f"cache.dir={tmp_path / 'cache'}")
    run = start(2, "benchmarks/sequence.py", "recipe=tiny_hunyuan", *SMALL, *places)
    for code, said in finish(run):
        assert code == 0, said
    (result,) = tmp_path.glob("*-sequence-cpu.md")
    text = result.read_text()
    assert "2 processes" in text and "1 dual dense, 1 dual sparse, 1 single sparse" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    each, shared = (row for row in rows if row[0].endswith(("each", "on 2")))
    assert each[1] == shared[1] == "576"
    clip, efficiency = float(shared[3]), float(shared[4])
    assert efficiency == pytest.approx(float(each[3]) / clip, rel=0.02)


@pytest.mark.slow
def test_one_process_is_told_how_to_start(tmp_path):
    ((code, said),) = finish(start(1, "benchmarks/sequence.py", "recipe=tiny_wan"))
    assert code == 1 and "accelerate launch" in said
