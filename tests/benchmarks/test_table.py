"""Figures of the benchmark's tables, by hand."""

import pytest
from lib.table import Row, fastest, table, verdict

# 1e12 operations forward: 1000 / ms TFLOP/s forward, 2500 / ms backward.
ROWS = [
    Row("ours", 1e12, memory=3 * 2**20).timed(2, 5),
    Row("flex", 1e12).timed(4, 8),
    Row("flex, heads first", 1e12).timed(3, 10),
    Row("fa4", 1e12, "wrong: dq | dk"),
    Row("dense cuDNN", 1e13).timed(16, 40),
]


def cells(text: str, kernel: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {kernel} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_rates_count_the_backward_two_and_a_half_times():
    assert ROWS[0].rates == pytest.approx((500, 500, 500))
    assert ROWS[4].rates == pytest.approx((625, 625, 625))


def test_fastest_is_pass_by_pass():
    row = fastest(ROWS, "flex")
    assert row is not None and row.milliseconds == (3, 8, 11)
    assert fastest(ROWS, "fa4") is None


def test_table():
    text = table(ROWS, density=0.1)
    assert cells(text, "ours") == [
        "2.00 / 5.00 / 7.00",
        "500 / 500 / 500",
        "8.00 / 8.00 / 8.00",
        "80% / 80% / 80%",
        "1.50 / 1.60 / 1.57",
        "3",
    ]
    assert cells(text, "dense cuDNN")[2:4] == ["1.00 / 1.00 / 1.00", "10% / 10% / 10%"]


def test_a_wrong_kernel_shows_no_time():
    assert cells(table(ROWS, 0.1), "fa4") == ["wrong: dq / dk", "", "", "", "", ""]


def test_without_dense_attention_nothing_is_compared_with_it():
    assert cells(table(ROWS[:3], 0.1), "ours")[2:5] == ["-", "-", "1.50 / 1.60 / 1.57"]


def known(forward: float, backward: float) -> list[Row]:
    """cuDNN as known; flex at these rates."""
    return [
        Row("flex", 1e12).timed(1000 / forward, 2500 / backward),
        Row("dense cuDNN", 1e12).timed(1000 / 604, 2500 / 547),
    ]


def test_verdict():
    def judged(rows, grid="hunyuan-3600x64", device="NVIDIA H200", head_dim=128):
        return verdict(grid, device, head_dim, rows)

    fine = judged(known(400, 395))
    assert fine == (
        "Counts: flex runs at 400 / 395 TFLOP/s (415 / 380 known), "
        "dense cuDNN runs at 604 / 547 TFLOP/s (604 / 547 known)."
    )
    for forward, backward in ((390, 380), (415, 360), (440, 380), (415, 400)):
        assert judged(known(forward, backward)).startswith("Does not count: flex runs at")
    assert "dense cuDNN was not timed" in judged(known(415, 380)[:1])
    assert judged(known(1, 1), grid="hunyuan-3600x32") == ""
    assert judged(known(1, 1), device="NVIDIA H100").startswith("No anchors for NVIDIA H100")
    assert judged(known(1, 1), head_dim=64).startswith("No anchors")
