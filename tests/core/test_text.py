from __future__ import annotations

import pytest

from kohya_mps.core.text import format_size, join_some, shorten, strip_ansi


@pytest.mark.parametrize(
    ("drawn", "plain"),
    [
        ("\x1b[1;31merror\x1b[0m: no space", "error: no space"),
        ("\x1b[2K100%|####|", "100%|####|"),
        ("\x1b[?25l hidden cursor", " hidden cursor"),
        ("\x1b]0;a title\x07text", "text"),
        ("\x1b]8;;https://example.invalid\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("[0m is no escape sequence", "[0m is no escape sequence"),
        ("Größe", "Größe"),
    ],
)
def test_what_draws_in_a_terminal_is_removed_from_text_and_bytes(drawn: str, plain: str) -> None:
    assert strip_ansi(drawn) == plain
    assert strip_ansi(drawn.encode()) == plain.encode()


def test_a_long_text_ends_with_an_ellipsis_and_a_short_one_does_not() -> None:
    assert shorten("abcdef", 3) == "abc…"
    assert shorten("abc", 3) == "abc"


def test_a_long_list_ends_with_how_many_more_there_are() -> None:
    assert join_some([]) == ""
    assert join_some(list("abcde")) == "a, b, c, d, e"
    assert join_some(list("abcdefg")) == "a, b, c, d, e, and 2 more"
    assert join_some(["one", "two", "three"], 1, "\n") == "one\nand 2 more"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0.00 MB"),
        (9_437_184, "9.44 MB"),
        (123e6, "123 MB"),
        (999e6, "999 MB"),
        (1e9, "1.00 GB"),
        (10e9, "10.0 GB"),
        (11.97e9, "12.0 GB"),
        (100e9, "100 GB"),
        (500e9, "500 GB"),
    ],
)
def test_a_size_has_the_unit_and_the_digits_that_people_read(count: float, shown: str) -> None:
    assert format_size(count) == shown
