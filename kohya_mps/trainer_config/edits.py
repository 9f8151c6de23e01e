"""Changes to the text of a configuration file: what is requested, and what was done."""

from __future__ import annotations

import re

import msgspec

from kohya_mps.core.text import shorten

Value = bool | int | float | str | None


class Edit(msgspec.Struct, frozen=True):
    """A setting, by the trainers' name, and its new value; None removes it."""

    name: str
    value: Value
    why: str


class Change(msgspec.Struct, frozen=True):
    """A setting that was changed, as the file writes it; ``now`` is empty if it was removed."""

    name: str
    was: str
    now: str
    why: str


class Corrected(msgspec.Struct, frozen=True):
    """A corrected text, what was changed in it, and the settings that could not be changed."""

    text: str
    changes: tuple[Change, ...]
    not_fixable: tuple[str, ...]


def one_line(text: str) -> str:
    """A text as a comment can hold it: its first 160 characters, on one line."""
    return shorten(re.sub(r"[\x00-\x1f\x7f]+", " ", text).strip(), 160)


def replace_spans(text: str, spans: list[tuple[int, int, str]]) -> str:
    """Replace parts of a text: each span is a start, an end and the new text between them."""
    for start, end, new in sorted(spans, reverse=True):
        text = text[:start] + new + text[end:]
    return text
