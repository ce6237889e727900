"""Fitted exponents, their table and their plot."""

import math

import pytest
from lib.growth import Length, draw, exponent, table

from longreel.sparse.grid import TokenGrid

GRIDS = [TokenGrid(frames, 45, 80) for frames in (16, 32, 64)]
# Time grows with tokens to the 1.5th power, kept blocks to the first.
LENGTHS = [Length(g, g.frames * 100, g.frames**1.5, 2 * g.frames**1.5) for g in GRIDS]


@pytest.mark.parametrize("power", [1.0, 1.37, 2.0])
def test_exponent_of_a_power_law(power):
    sizes = [100, 300, 700, 5000]
    assert exponent(sizes, [0.3 * size**power for size in sizes]) == pytest.approx(power)


def test_exponent_of_n_log_n_lies_between():
    sizes = [57_600, 460_800]
    assert 1.05 < exponent(sizes, [n * math.log(n) for n in sizes]) < 1.15


def test_table():
    *_, longest, exponents = table(LENGTHS).splitlines()
    growth = 4 * math.log(230_400) / math.log(57_600)
    assert longest == (
        f"| 64 | 230,400 | 6,400 | 512.00 | 1024.00 | 8.00 | 4.00 | {growth:.2f} | 16.00 |"
    )
    assert exponents.startswith("| exponent | | | | | 1.500 | 1.000 | 1.0")
    assert exponents.endswith("| 2.000 |")


def test_plot(tmp_path):
    draw(LENGTHS, tmp_path / "growth.svg")
    text = (tmp_path / "growth.svg").read_text()
    assert "measured: exponent 1.50" in text
    assert len(text) < 50_000
    assert [path.name for path in tmp_path.iterdir()] == ["growth.svg"]
