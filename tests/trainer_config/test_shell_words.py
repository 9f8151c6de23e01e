"""The words of commands in the shells that people paste from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohya_mps.trainer_config.shell_words import commands


def words(text: str, *, windows: bool = False) -> list[list[str]]:
    return [[word.value for word in command] for command in commands(text, windows)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a  b\tc", [["a", "b", "c"]]),
        ("a\nb", [["a"], ["b"]]),
        ("a && b || c; d | e & f", [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]),
        ("a&&b;c", [["a"], ["b"], ["c"]]),
        ("a \\\n  b", [["a", "b"]]),
        ("a \\  \r\n  b", [["a", "b"]]),
        ("a\\\nb", [["a", "b"]]),
        ("# all\na # rest ; b\nc#d", [["a"], ["c#d"]]),
        ("'a b' \"c d\" e'f'\"g\"", [["a b", "c d", "efg"]]),
        (r'"a \" \\ \$ \n"', [[r'a " \ $ \n']]),
        (r"'a \' b", [["a \\", "b"]]),
        (r"a\ b \$c", [["a b", "$c"]]),
        ("'open to the\nend", [["open to the\nend"]]),
        ("a\\", [["a"]]),
        ("''", [[""]]),
        ("", []),
        (" \n ;; ", []),
    ],
)
def test_a_posix_shells_words(text: str, expected: list[list[str]]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a C:\b\c", [["a", r"C:\b\c"]]),
        (r'"C:\b\" c', [["C:\\b\\", "c"]]),
        ("a `\n b", [["a", "b"]]),
        ("a ^\r\n b", [["a", "b"]]),
        ("a \\\n b", [["a", "b"]]),
        ("a ` b", [["a", "`", "b"]]),
    ],
)
def test_the_words_of_powershell_and_cmd(text: str, expected: list[list[str]]) -> None:
    assert words(text, windows=True) == expected


@pytest.mark.parametrize(
    ("text", "windows", "expected"),
    [
        ("A=1\nx $A ${A}b", False, [["x", "1", "1b"]]),
        ("export A='1 2'\nx $A", False, [["x", "1 2"]]),
        ("A=1 B=2 x $B\ny $B", False, [["x", "$B"], ["y", "2"]]),
        ("env A=1 x", False, [["x"]]),
        ("x A=1", False, [["x", "A=1"]]),
        ("x $B", False, [["x", "$B"]]),
        ("set A=1\nx %A%", True, [["x", "1"]]),
        ('$A = "1"\nx $A $env:A', True, [["x", "1", "1"]]),
        ("$A = [Math]::Floor(3)\nx $A", True, [["x", "$A"]]),
        ("$A = $(date)\nx $A", True, [["x", "$A"]]),
        ("$A = 1 2\nx $A", True, [["x", "$A"]]),
        ("A=1\nA=$A2\nx $A", False, [["x", "$A2"]]),
    ],
)
def test_variables_that_the_script_sets_are_filled_in(
    text: str, windows: bool, expected: list[list[str]]
) -> None:
    assert words(text, windows=windows) == expected


def test_every_word_says_where_it_is() -> None:
    text = "A='1'\nx \"$A b\" \\\n  y"
    (command,) = commands(text, windows=False)

    assert [text[word.start : word.end] for word in command] == ["x", '"$A b"', "y"]


@given(text=st.text(st.sampled_from("ab '\"\\`^\n\r;|&#$%=(){} "), max_size=40), windows=st.booleans())
def test_words_of_any_text_follow_one_another(text: str, windows: bool) -> None:
    found = [word for command in commands(text, windows) for word in command]

    assert all(0 <= word.start < word.end <= len(text) for word in found)
    assert all(before.end <= after.start for before, after in pairwise(found))
