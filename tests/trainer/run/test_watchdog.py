"""A run in which one process cannot go on ends in all of them, and says why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CASES = ["fine", "killed", "cut off", "stuck", "raises"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[dict[str, tuple[int, float]], Path]:
    """Exit code and seconds of each process, by case and rank, and the folder of what they said."""
    folder = tmp_path_factory.mktemp("watched")
    subprocess.run(
        [sys.executable, "tests/helpers/watched.py", str(folder), *CASES],
        cwd=ROOT,
        check=True,
        timeout=90,
    )
    return json.loads((folder / "codes.json").read_text()), folder


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("killed", "process 1 is dead or cut off: it was last heard"),
        ("cut off", "process 1 is dead or cut off: it was last heard"),
        ("stuck", "longer than parallel.timeout allows. The others: process 1 in step 3: reading"),
        ("raises", "process 1 failed in step 3: reading clips: ValueError: clip 7 is damaged"),
    ],
)
def test_the_others_end_and_name_the_cause(ended, case, said):
    """Within gone, limit or grace, of 2, 3 and 1 seconds here, and what it takes to start."""
    codes, folder = ended
    code, seconds = codes[f"{case}-0"]
    text = (folder / f"{case}-0").read_text()
    assert code == 1 and said in text and "process 0" in text, text
    assert "step 3: exchange" in text
    assert seconds < 20


def test_the_stuck_process_names_its_place_too(ended):
    codes, folder = ended
    text = (folder / "stuck-1").read_text()
    assert codes["stuck-1"][0] == 1 and "step 3: reading clips" in text
    assert 'watched.py", line' in text and "in fail" in text  # the stack


def test_a_run_that_is_well_is_left_alone(ended):
    codes, folder = ended
    for rank in (0, 1):
        assert codes[f"fine-{rank}"][0] == 0
        assert (folder / f"fine-{rank}").read_text() == "complete\n"
