"""Settings carry their documentation and their range."""

from pathlib import Path

import pytest

from longreel.trainer.config.checks import problems
from longreel.trainer.config.fields import Range, settings_of
from longreel.trainer.config.recipe import load
from longreel.trainer.config.reference import documented_settings, page
from longreel.trainer.config.schema import Config
from longreel.trainer.config.values import accepted

ROOT = Path(__file__).parents[3]
SETTINGS = list(settings_of(Config))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_has_a_sentence(setting):
    assert len(setting.text) > 10 and setting.text.endswith(".") and "  " not in setting.text


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_number_has_a_range_that_holds_its_default(setting):
    numbers = (int, float, list[int], list[float], int | None, float | None)
    free = {"validate.guidance", "train.sigma.mean"}  # any number is meant
    assert (setting.hint in numbers and setting.key not in free) <= (setting.range is not None)
    if setting.range is not None and setting.default is not None:
        values = setting.default if isinstance(setting.default, list) else [setting.default]
        assert not any(setting.range.problem(value) for value in values)


def test_the_page_of_settings_is_up_to_date():
    """`python -m longreel.trainer.config.reference > docs/settings.md` writes it."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page()


def test_the_page_has_each_setting_once():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    keys = [line.split("`")[1] for line in rows]
    documented = [setting.key for setting in documented_settings()]
    assert keys[: len(documented)] == documented
    assert [s.key for s in SETTINGS if s.key not in documented] == ["sparse.pattern"]


@pytest.mark.parametrize(
    ("range_", "value", "problem"),
    [
        (Range(above=0), 0, "must be positive"),
        (Range(above=0), 1, None),
        (Range(least=0), -1, "must not be negative"),
        (Range(least=0), 0, None),
        (Range(least=0, below=1), 1, "must be at least 0 and below 1"),
        (Range(above=0, most=1), 1, None),
        (Range(above=0, most=1), 1.5, "must be above 0 and at most 1"),
        (Range(least=2), 1, "must be at least 2"),
        (Range(below=2**32, least=0), 2**32, "must be at least 0 and below 2^32"),
    ],
)
def test_a_range_says_what_is_wrong(range_, value, problem):
    assert range_.problem(value) == problem


def test_recipes_are_within_their_ranges():
    assert list(problems(load(["recipe=hunyuan_2x"]))) == []


def test_what_a_setting_takes_is_said_in_words():
    said = {setting.key: accepted(setting) for setting in SETTINGS}
    assert said["frames"] == "a whole number above 0, or null"
    assert said["validate.sigmas"] == "a list of numbers above 0 and at most 1"
    assert said["memory.offload"] == "true or false"
