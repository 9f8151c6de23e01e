"""A trainer's TOML: read with the standard library, edited with tomlkit.

tomlkit keeps comments, order, blanks and line ends. It is slow to import and to parse, so
it is loaded only when something is edited.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kohya_mps.core.errors import StepFailed, UsageError

from .contents import ACCEPTED
from .edits import Change, Corrected, Edit, one_line

if TYPE_CHECKING:
    from tomlkit import TOMLDocument
    from tomlkit.container import Container
    from tomlkit.items import InlineTable, Item, Key


def parse(path: Path, text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        UsageError: it is not valid; the message names the line.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply for settings", ACCEPTED) from None
    except ValueError as error:  # also from int(), which refuses numbers of 4300 digits
        hint = "in TOML, write each backslash twice in double quotes, or use 'single quotes'"
        raise UsageError(f"{path} is not valid TOML: {error}", hint if "\\" in text else ACCEPTED) from error


def flatten(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without their sections, merged as the trainer's ``read_config_from_file`` does.

    sd-scripts 2e0fcc50, ``library/train_util.py``, line 4655: one level of tables is
    merged, in the order of the file, and the last of two equal names wins.
    """
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def edit(text: str, edits: list[Edit]) -> Corrected:
    """The text with settings changed. Each changed line gets a comment with what it was and why.

    Raises:
        StepFailed: tomlkit cannot read the text, or would not write it back as it is.
    """
    from tomlkit import item

    document = _parse_for_editing(text)
    added: list[str] = []
    changes: list[Change] = []
    not_fixable: list[str] = []
    for change in edits:
        found = _occurrences(document, change.name)
        now = "" if change.value is None else item(change.value).as_string()
        if any(setting.is_table for setting in found) or (not found and change.name in document):
            not_fixable.append(change.name)  # a section has this name
        elif found:
            was = json.dumps(found[-1].value.unwrap(), default=str)
            for setting in found if change.value is None else found[-1:]:
                setting.change(change)
            changes.append(Change(change.name, was, now, change.why))
        elif change.value is not None:
            end = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
            added.append(f"{change.name} = {now}  # preflight: added, {one_line(change.why)}{end}")
            changes.append(Change(change.name, "", now, change.why))
    # Sections do not matter to the trainers, and the first line is never inside one.
    return Corrected("".join(added) + document.as_string(), tuple(changes), tuple(not_fixable))


def _parse_for_editing(text: str) -> TOMLDocument:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
        problem = "" if document.as_string() == text else "tomlkit does not write it back unchanged"
    except (TOMLKitError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise StepFailed(
            f"this TOML cannot be corrected automatically: {problem}",
            "change the settings that the report names by hand",
        )
    return document


class _Setting(NamedTuple):
    """A setting in the document: ``container.body[position]`` is its key and its value.

    ``prefix`` is what stands before the last part of a dotted key. ``inline`` is the inline
    table that the setting is in, if it is in one.
    """

    container: Container
    position: int
    key: Key
    value: Item
    prefix: str = ""
    inline: InlineTable | None = None

    @property
    def is_table(self) -> bool:
        """Whether a section has the setting's name: a value cannot stand in its position."""
        from tomlkit.items import AoT, Table

        return isinstance(self.value, Table | AoT)

    def change(self, edit: Edit) -> None:
        """Set the new value, or leave only a comment if there is none."""
        from tomlkit.items import Comment, Null, Trivia, item

        old = self.value.trivia
        statement = f"{self.prefix}{self.key.as_string()}{self.key.sep}{self.value.as_string()}"
        note = f"preflight: was {one_line(f'{statement}{old.comment_ws}{old.comment}')}; {one_line(edit.why)}"
        if edit.value is not None:
            new = item(edit.value)
            new.trivia.indent, new.trivia.trail = old.indent, old.trail
            self.container.body[self.position] = (self.key, new)
        elif self.inline is not None:
            self.container.body[self.position] = (None, Null())
        else:
            new = Comment(Trivia(indent=old.indent, trail=old.trail))
            self.container.body[self.position] = (None, new)
        # An inline table cannot contain comments: its line gets them.
        trivia = new.trivia if self.inline is None else self.inline.trivia
        trivia.comment_ws = "  "
        trivia.comment = f"{trivia.comment} {note}" if trivia.comment else f"# {note}"


def _occurrences(document: TOMLDocument, name: str) -> list[_Setting]:
    """Where a setting stands, in the order in which the trainer merges: the last one counts."""
    from tomlkit.items import InlineTable, Table

    by_section: dict[str, list[_Setting]] = {}
    for index, (key, value) in enumerate(document.body):
        if key is None:  # a comment or a blank line
            continue
        found = by_section.setdefault(key.key, [])
        if isinstance(value, Table | InlineTable):
            prefix = f"{key.as_string()}." if key.is_dotted() else ""
            inline = value if isinstance(value, InlineTable) else None
            found += [
                _Setting(value.value, at, inner, item, prefix, inline)
                for at, (inner, item) in enumerate(value.value.body)
                if inner is not None and inner.key == name
            ]
        elif key.key == name:
            found.append(_Setting(document, index, key, value))
    return [setting for found in by_section.values() for setting in found]
