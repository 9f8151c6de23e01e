"""Edits of a trainer's TOML: the requested settings change, every other byte stays."""

from __future__ import annotations

import json
import tomllib
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohya_mps.core.errors import StepFailed
from kohya_mps.trainer_config import toml
from kohya_mps.trainer_config.edits import Change, Corrected, Edit


def settings(text: str) -> dict[str, Any]:
    return toml.flatten(tomllib.loads(text))


def edited(text: str, **values: Any) -> str:
    return toml.edit(text, [Edit(name, value, "because") for name, value in values.items()]).text


def test_a_changed_line_keeps_its_indent_its_comment_and_its_line_end() -> None:
    text = '[train]\r\n  mixed_precision="fp16"   # half\r\nv2 = true\r\n'

    assert edited(text, mixed_precision="no") == (
        '[train]\r\n  mixed_precision="no"  # preflight: was mixed_precision="fp16"   # half; because\r\n'
        "v2 = true\r\n"
    )


def test_a_removed_setting_leaves_a_comment_in_its_line() -> None:
    assert edited("a = 1\n\txformers = true # fast\nb = 2\n", xformers=None) == (
        "a = 1\n\t# preflight: was xformers = true # fast; because\nb = 2\n"
    )


def test_a_last_line_without_a_line_end_stays_without_one() -> None:
    assert edited("a = 1", a=2) == "a = 2  # preflight: was a = 1; because"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_added_setting_stands_first_where_no_section_has_begun(end: str) -> None:
    text = f"[train]{end}v2 = true{end}"

    assert edited(text, sdpa=True) == f"sdpa = true  # preflight: added, because{end}{text}"


def test_a_value_over_several_lines_becomes_one_line() -> None:
    text = 'network_args = [\n  "a=1",  # one\n  "b=2",\n]\nv2 = true\n'

    assert edited(text, network_args="c=3") == (
        'network_args = "c=3"  # preflight: was network_args = [   "a=1",  # one   "b=2", ]; because\nv2 = true\n'
    )


def test_a_dotted_key_is_changed_where_it_is() -> None:
    assert edited('train . "v2" = true\nb = 1\ntrain.c = 2\n', v2=False) == (
        'train . "v2" = false  # preflight: was train . "v2" = true; because\nb = 1\ntrain.c = 2\n'
    )


def test_an_inline_table_gets_one_comment_for_all_its_changes() -> None:
    new = edited("train = {v2 = true, sdpa = false, seed = 1} # all\n", v2=None, sdpa=True)

    assert settings(new) == {"sdpa": True, "seed": 1}
    assert new.partition("}")[2] == (
        "  # all preflight: was v2 = true; because preflight: was sdpa = false; because\n"
    )


def test_of_two_equal_names_the_one_that_counts_is_changed_and_both_are_removed() -> None:
    text = "[one]\nsdpa = true\n[two]\nsdpa = false\n"

    assert edited(text, sdpa=True).splitlines()[:2] == ["[one]", "sdpa = true"]
    assert settings(edited(text, sdpa=True)) == {"sdpa": True}
    assert settings(edited(text, sdpa=None)) == {}


def test_a_section_that_is_continued_later_counts_where_it_began() -> None:
    text = "[one.deep]\nx = 1\n[two]\nsdpa = true\n[one]\nsdpa = false\n"

    assert settings(text)["sdpa"] is True
    assert settings(edited(text, sdpa=False))["sdpa"] is False


@pytest.mark.parametrize(
    "text", ["[sdpa]\nx = 1\n", "[train.sdpa]\nx = 1\n", "[[sdpa]]\nx = 1\n", "sdpa = {x = 1}\n"]
)
def test_a_section_with_the_name_of_a_setting_is_left_alone_and_reported(text: str) -> None:
    corrected = toml.edit(text, [Edit("sdpa", True, "because")])

    assert (corrected.text, corrected.changes, corrected.not_fixable) == (text, (), ("sdpa",))


def test_what_tomlkit_cannot_read_is_refused() -> None:
    with pytest.raises(StepFailed, match="cannot be corrected automatically"):
        toml.edit("a = [\n", [])


def test_a_change_says_what_was_and_what_is() -> None:
    corrected = toml.edit("d = 2024-01-02\n", [Edit("d", "x", "why"), Edit("e", 0.5, "why")])

    assert corrected.changes == (Change("d", '"2024-01-02"', '"x"', "why"), Change("e", "", "0.5", "why"))


def test_a_removal_of_what_is_not_there_changes_nothing() -> None:
    assert toml.edit("a = 1\n", [Edit("b", None, "why")]) == Corrected("a = 1\n", (), ())


# ---- Any TOML -----------------------------------------------------------------------------------

NAMES = ["mixed_precision", "resolution", "xformers", "sdpa", "network_args", "v2", "größe", "a-b"]
prose = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
blank = st.sampled_from(["", " ", "  ", "\t"])
comment = st.just("") | prose.map(lambda text: f" # {text}")


@st.composite
def lists(draw: st.DrawFn) -> str:
    items = draw(st.lists(prose.map(lambda text: json.dumps(text, ensure_ascii=False)), max_size=3))
    if draw(st.booleans()):
        return f"[{', '.join(items)}]"
    return "[\n" + "".join(f"  {item},{draw(comment)}\n" for item in items) + "]"


scalar = st.one_of(
    st.booleans().map(lambda value: str(value).lower()),
    st.integers(-1000, 1000).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    prose.map(lambda text: json.dumps(text, ensure_ascii=False)),
    prose.map(lambda text: "'" + text.replace("'", "") + "'"),
    st.just(date(2024, 1, 2).isoformat()),
)
value = (
    scalar | lists() | prose.map(lambda text: "'''\n" + text.replace("'", "") + "\n[not] = a section\n'''")
)


@st.composite
def statement(draw: st.DrawFn, key: str, choices: st.SearchStrategy[str] = value) -> str:
    equals = draw(st.sampled_from(["=", " = ", "  =\t"]))
    return f"{draw(blank)}{key}{equals}{draw(choices)}{draw(comment)}\n"


@st.composite
def body(draw: st.DrawFn, keys: list[str]) -> list[str]:
    parts = [draw(statement(draw(st.sampled_from([key, json.dumps(key)])))) for key in keys]
    between = st.sampled_from(["", "\n", "# a comment = 1\n", "   \n"])
    return [piece for part in parts for piece in (draw(between), part) if piece]


@st.composite
def chunks(draw: st.DrawFn) -> list[str]:
    """A file in pieces: each a statement, a section's header, a comment or a blank line."""
    keys = st.lists(st.sampled_from(["v2", "sdpa", "xformers", "resolution", "seed"]), unique=True)
    pieces = draw(body(draw(keys)))
    for name in draw(keys):
        pieces.append(draw(statement(f"dotted{draw(st.sampled_from(['.', ' . ']))}{name}")))
    if draw(st.booleans()):
        inner = ", ".join(f"{name} = {draw(scalar)}" for name in draw(keys))
        pieces.append(draw(statement("inline", st.just(f"{{{inner}}}"))))
    for section in draw(st.lists(st.sampled_from(["one", "two", "größe", '"a b"']), unique=True)):
        if section == "two" and draw(st.booleans()):
            pieces += ["[two.deep]\n", *draw(body(draw(keys)))]
        header = section if section.startswith('"') or section.isascii() else f'"{section}"'
        pieces += [f"[{header}]{draw(comment)}\n", *draw(body(draw(keys)))]
    if draw(st.booleans()):
        pieces += ["[[many]]\n", "v2 = 1\n"]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return [piece.replace("\n", end) for piece in pieces]


edits = st.dictionaries(
    st.sampled_from(["v2", "sdpa", "xformers", "resolution", "seed", "absent"]),
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(0, 1) | prose,
)


@given(pieces=chunks(), values=edits, why=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_toml_gets_its_edits_and_keeps_every_other_byte(
    pieces: list[str], values: dict[str, Any], why: str
) -> None:
    text = "".join(pieces)
    before = settings(text)
    corrected = toml.edit(text, [Edit(name, new, why) for name, new in values.items()])

    assert corrected.not_fixable == ()
    after = {**before, **values}
    assert settings(corrected.text) == {
        name: v for name, v in after.items() if name not in values or v is not None
    }

    rest = corrected.text
    for name, new in values.items():
        if name not in before and new is not None:
            line, _, rest = rest.partition("\n")
            assert line.startswith(f"{name} = ")
            assert "# preflight: added" in line
    for piece in pieces:
        if rest.startswith(piece):
            rest = rest.removeprefix(piece)
        else:
            line, _, rest = rest.partition("\n")
            assert "preflight: was " in line
            assert line.endswith("\r") == piece.endswith("\r\n")
    assert rest == ""
