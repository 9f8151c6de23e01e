"""Texts for comments, and parts of a text that are replaced."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kohya_mps.trainer_config.edits import one_line, replace_spans


def test_parts_of_a_text_are_replaced_wherever_they_stand_in_the_list() -> None:
    spans = [(0, 1, "one"), (4, 5, ""), (2, 3, "two and more")]
    assert replace_spans("a b c d", spans) == "one two and more  d"


def test_without_parts_the_text_stays() -> None:
    assert replace_spans("a = 1\n", []) == "a = 1\n"


@given(st.text())
def test_a_comment_is_one_line_whatever_its_text(text: str) -> None:
    assert not set(one_line(text)) & {"\n", "\r", "\t", "\0", "\x7f"}


def test_a_long_text_is_cut_with_a_mark() -> None:
    assert one_line("x" * 160) == "x" * 160
    assert one_line("x" * 161) == "x" * 160 + "…"


def test_a_short_text_is_kept_in_a_comment() -> None:
    assert one_line(" it was\n\tfp16 ") == "it was fp16"
