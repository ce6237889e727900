"""data.filter accepts its grammar and refuses everything else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreel.data.filter import parse

ROW = {
    "aesthetic": "5.5",
    "motion score": 4,
    "fps": 29.97,
    "caption": "A Dog runs",
    "empty": "",
    "nan": "nan",
}


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ("aesthetic > 5.2", True),
        ("aesthetic > 5.5", False),
        ("aesthetic >= 5.5", True),
        ('aesthetic > 5.2 and "motion score" > 3', True),
        ('aesthetic > 6 or "motion score" == 4', True),
        ("not aesthetic > 6", True),
        ("not (aesthetic > 5 and fps < 20)", True),
        # `and` binds closer than `or`, `not` closer than `and`.
        ("fps > 0 or fps > 0 and fps < 0", True),
        ("not fps < 0 and fps < 0", False),
        ("caption contains 'dog'", True),
        ("caption contains 'cat'", False),
        ("caption == 'A Dog runs'", True),
        ("caption != 'A Dog runs'", False),
        ("fps > -1e3", True),
        ("empty > 0", False),
        ("empty <= 0", False),
        ("nan > 0 or nan <= 0", False),
        ("missing != 1", False),
        ("caption > 3", False),
    ],
)
def test_rules(rule, passes):
    assert parse(rule)(ROW) is passes


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "a column's name is missing at the end"),
        ("aesthetic", "a comparison is missing at the end"),
        ("aesthetic >", "a number or 'text' is missing at the end"),
        ("aesthetic > fps", "a number or 'text' is expected, not 'fps' (character 13)"),
        ("aesthetic = 5", "'= 5' is not understood (character 11)"),
        ("5 < aesthetic", "a column's name is expected, not '5' (character 1)"),
        ("aesthetic > 5 fps > 3", "'fps' follows a complete rule"),
        ("(aesthetic > 5", "a closing parenthesis is missing"),
        ("and > 5", "a column's name is expected, not 'and'"),
        ("caption contains 5", "text in single quotes is expected, not '5'"),
        ("__import__('os').system('x') > 0", "system('x')\" is not understood (character 17)"),
        ("a.b > 0", "'.b > 0' is not understood"),
        ("f(1) > 0", "is expected, not '('"),
        ("a > 1; b > 2", "'; b > 2' is not understood"),
        ("a > 5abc", "is not understood"),
        ("(" * 60 + "a > 1" + ")" * 60, "too many parentheses"),
        ("not " * 60 + "a > 1", "too many parentheses"),
    ],
)
def test_what_is_not_of_the_grammar_is_refused_with_its_place(rule, message):
    with pytest.raises(ValueError) as caught:
        parse(rule)
    assert message in str(caught.value) and str(caught.value).startswith("data.filter=")


def test_unknown_columns_are_named_with_the_nearest():
    rule = parse('"motion scor" > 3')
    with pytest.raises(ValueError, match="no column 'motion scor'. Did you mean 'motion score'"):
        rule.check_columns(ROW)
    with pytest.raises(ValueError, match="No column of numbers or texts came with these videos"):
        rule.check_columns([])
    assert parse("fps > 3 and empty > 1").explain(ROW) == "fps is 29.97, empty is missing"


@settings(max_examples=40, deadline=None)
@given(st.text("ab><='\"()1. andortc", max_size=30))
def test_any_text_parses_or_is_refused(text):
    try:
        parse(text)(ROW)
    except ValueError as error:
        assert str(error).startswith("data.filter=")
