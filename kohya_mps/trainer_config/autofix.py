"""``--fix``: a copy of a training's file with settings changed, everything else byte for byte.

A TOML file gets a comment at every changed line. JSON has no comments: the line before a
changed one names it, under a key that begins with ``//`` and that the GUI passes over. In a
command a comment cannot stand between continued lines, so the comments are above it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.text import shorten

from .config_file import ConfigFile, Kind, is_windows, trainer_at
from .shell_words import Word, commands
from .trainer_options import WrongType

Value = bool | int | float | str | None


class Edit(msgspec.Struct, frozen=True):
    """A setting, by the trainers' name, that should have another value; None takes it out."""

    name: str
    value: Value
    why: str


class Change(msgspec.Struct, frozen=True):
    """A setting that was changed, as the file names it."""

    name: str
    was: str
    now: str
    why: str


class Corrected(msgspec.Struct, frozen=True):
    """A corrected text: what was changed in it, and which settings could not be."""

    text: str
    changes: tuple[Change, ...]
    not_fixable: tuple[str, ...]


def autofix(file: ConfigFile, wanted: list[Edit]) -> Corrected:
    """The file's text with settings changed."""
    if file.kind is Kind.TOML:
        return _toml(file.text, wanted)
    if file.kind is Kind.GUI:
        return _json(file.text, wanted)
    if file.kind is Kind.COMMAND:
        return _command(file, wanted)
    return Corrected(file.text, (), tuple(w.name for w in wanted))


def save(file: ConfigFile, corrected: Corrected, out: Path) -> None:
    """Write the corrected copy.

    Raises:
        UsageError: it would overwrite a file, the original above all.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already and is not overwritten", "give --fix another name")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no directory", "give --fix another name")
    _check(file, corrected)
    write_atomic(out, corrected.text.encode())


def coerce(wrong: WrongType) -> Value:
    """The same value with the type that the trainer takes; nothing when that is not clear."""
    if wrong.wanted == "a text in quotes" and isinstance(wrong.found, int | float):
        return str(wrong.found)
    if wrong.wanted == "a text in quotes" and isinstance(wrong.found, list):
        return ",".join(map(str, wrong.found))
    try:
        if wrong.wanted == "a whole number" and isinstance(wrong.found, str):
            return int(wrong.found) if len(wrong.found) < 12 else None
        if wrong.wanted == "a number" and isinstance(wrong.found, str):
            return float(wrong.found)
    except ValueError:
        return None
    words = {"true": True, "false": False}
    return words.get(str(wrong.found).lower()) if wrong.wanted == "true or false" else None


def _check(file: ConfigFile, corrected: Corrected) -> None:
    """A copy that cannot be read any more is never written."""
    try:
        if file.kind is Kind.TOML:
            tomllib.loads(corrected.text)
        elif file.kind is Kind.GUI:
            json.loads(corrected.text)
    except ValueError as error:
        raise StepFailed(
            f"{file.path} is written in a way that cannot be corrected automatically: {error}",
            "change the settings that the report names by hand",
        ) from error


# ---- TOML ---------------------------------------------------------------------------------------


class _Statement(msgspec.Struct, frozen=True):
    """One key with its value: the lines it takes, its comment, and where in the tables it stands."""

    start: int
    end: int
    key: str
    name: str
    value: Any


def _toml(text: str, wanted: list[Edit]) -> Corrected:
    lines = text.splitlines(keepends=True)
    ending = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    statements = {s.name: s for s in _statements(lines)}  # the last of two equal names wins
    changes, added = [], []
    for want in wanted:
        statement = statements.get(want.name)
        if statement is None:
            if want.value is not None:
                added.append(
                    f"{want.name} = {_toml_value(want.value)}  # preflight: added, {_one_line(want.why)}{ending}"
                )
                changes.append(Change(want.name, "", _toml_value(want.value), want.why))
            continue
        was = "".join(lines[statement.start : statement.end])
        comment = f"# preflight: was {_one_line(was)}; {_one_line(want.why)}"
        indent = was[: len(was) - len(was.lstrip())]
        new = (
            f"{indent}{statement.key} = {_toml_value(want.value)}  {comment}"
            if want.value is not None
            else f"{indent}{comment}"
        )
        keep_end = ending if was.endswith("\n") else ""
        lines[statement.start : statement.end] = [
            new + keep_end,
            *[""] * (statement.end - statement.start - 1),
        ]
        now = "" if want.value is None else _toml_value(want.value)
        changes.append(Change(want.name, json.dumps(statement.value, default=str), now, want.why))
    # Sections do not count for the trainers, and the top is never inside of one.
    return Corrected("".join(added) + "".join(lines), tuple(changes), ())


def _statements(lines: list[str]) -> Iterator[_Statement]:
    """The keys that the trainers see, each with its lines."""
    at, depth = 0, 0
    while at < len(lines):
        stripped = lines[at].strip()
        if stripped.startswith("["):
            header = tomllib.loads(stripped)
            depth = 0
            while isinstance(header, dict) and header:
                header = next(iter(header.values()))
                depth = depth + 1 if isinstance(header, dict) else 99
        if not stripped or stripped.startswith(("#", "[")):
            at += 1
            continue
        end, parsed = _statement_end(lines, at)
        key = lines[at].partition("=")[0].strip()
        path: list[str] = []
        value: Any = parsed
        # a.b = 1 is the same as b = 1 below [a].
        while isinstance(value, dict) and len(value) == 1 and len(path) < key.count(".") + 1:
            ((name, value),) = value.items()
            path.append(name)
        if path and depth + len(path) <= 2:
            yield _Statement(at, end, key, path[-1], value)
        at = end


def _statement_end(lines: list[str], start: int) -> tuple[int, dict[str, Any]]:
    """Where a value that may take several lines ends: at the first line that makes it whole."""
    text = ""
    for end in range(start, len(lines)):
        text += lines[end]
        try:
            return end + 1, tomllib.loads(text.replace("\r\n", "\n"))
        except tomllib.TOMLDecodeError:
            continue
    return len(lines), {}


def _toml_value(value: Value) -> str:
    # JSON's texts, numbers and truth values are TOML's, too.
    return json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    plain = re.sub(r"[\x00-\x1f\x7f]+", " ", text).strip()
    return shorten(plain, 160)


# ---- The GUI's JSON -----------------------------------------------------------------------------

_GUI_NAMES = {
    "optimizer_type": "optimizer",
    "resolution": "max_resolution",
    "no_half_vae": "sdxl_no_half_vae",
}


class _Member(msgspec.Struct, frozen=True):
    """A member of the JSON object, with the places of its key and its value."""

    name: str
    key_start: int
    start: int
    end: int


def _json(text: str, wanted: list[Edit]) -> Corrected:
    members = {m.name: m for m in _members(text)}
    changes: list[Change] = []
    pieces: list[tuple[int, int, str]] = []
    for name, value, why in _for_gui(wanted, members):
        member = members.get(name)
        new = json.dumps(value, ensure_ascii=False)
        if member is None:
            if value in ("", False, 0):
                continue
            first = text.index("{") + 1
            pieces.append(
                (first, first, f"\n  {_json_note(name, 'added', why)},\n  {json.dumps(name)}: {new},")
            )
            changes.append(Change(name, "", new, why))
            continue
        was = text[member.start : member.end]
        if was == new:
            continue
        line = text.rfind("\n", 0, member.key_start) + 1
        indent = text[line : member.key_start]
        between = f",\n{indent}" if indent.isspace() or not indent else ", "
        pieces.append((member.key_start, member.key_start, _json_note(name, f"was {was}", why) + between))
        pieces.append((member.start, member.end, new))
        changes.append(Change(name, was, new, why))
    return Corrected(_replaced(text, pieces), tuple(changes), ())


def _for_gui(wanted: list[Edit], members: dict[str, _Member]) -> Iterator[tuple[str, Value, str]]:
    """The same wishes by the GUI's names. In the GUI empty is what it does not tell the trainer."""
    for want in wanted:
        if want.name in ("xformers", "sdpa"):
            if want.value:
                yield "xformers", want.name, want.why
        elif want.name in ("use_8bit_adam", "launch_cpu"):
            continue
        elif want.name == "network_module":
            yield "LoRA_type", "Standard", want.why
        elif want.name == "max_data_loader_n_workers":
            yield want.name, want.value, want.why
        else:
            name = _GUI_NAMES.get(want.name, want.name)
            empty: Value = 0 if want.name in ("blocks_to_swap", "validation_split") else False
            yield name, empty if want.value is None else want.value, want.why


def _json_note(name: str, what: str, why: str) -> str:
    return f"{json.dumps('// ' + name)}: {json.dumps(_one_line(f'preflight: {what}; {why}'), ensure_ascii=False)}"


def _members(text: str) -> Iterator[_Member]:
    """The members of the outermost object; the text is known to be valid."""
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    at = skip(text.index("{") + 1)
    while text[at] == '"':
        name, after = decoder.raw_decode(text, at)
        start = skip(after)
        _, end = decoder.raw_decode(text, start)
        yield _Member(name, at, start, end)
        at = skip(end)


def _replaced(text: str, pieces: list[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(pieces, reverse=True):
        text = text[:start] + new + text[end:]
    return text


# ---- A command ----------------------------------------------------------------------------------


def _command(file: ConfigFile, wanted: list[Edit]) -> Corrected:
    found = next(
        (
            (w, at)
            for w in commands(file.text, is_windows(file.path, file.text))
            if (at := trainer_at(w)) is not None
        ),
        None,
    )
    if found is None:
        return Corrected(file.text, (), tuple(w.name for w in wanted))
    words, at = found
    options = dict(_options(words[max(at, 0) :]))
    options |= {f"launch_{name}": span for name, span in _options(words[: max(at, 0)])}
    changes, pieces, left = [], [], []
    for want in wanted:
        span = options.get(want.name) or (
            options.get("launch_use_cpu") if want.name == "launch_cpu" else None
        )
        new = _option(want.name, want.value)
        if span is None and want.value is None:
            if want.name in file.settings:
                left.append(want.name)
            continue
        if span is None:
            pieces.append((words[-1].end, words[-1].end, f" {new}"))
        else:
            pieces.append((span[0].start, span[-1].end, new))
        was = file.text[span[0].start : span[-1].end] if span else ""
        changes.append(Change(want.name, was, new, want.why))
    if not changes:
        return Corrected(file.text, (), tuple(left))
    start = file.text.rfind("\n", 0, words[0].start) + 1
    mark = "REM" if file.path.suffix.lower() in {".bat", ".cmd"} else "#"
    ending = "\r\n" if "\r\n" in file.text else "\n"
    notes = "".join(
        f"{mark} preflight: {_one_line(c.was) or 'added'} -> {c.now or 'left out'}; {_one_line(c.why)}{ending}"
        for c in changes
    )
    return Corrected(_replaced(file.text, [*pieces, (start, start, notes)]), tuple(changes), tuple(left))


def _options(words: list[Word]) -> Iterator[tuple[str, list[Word]]]:
    """The options of a command: the name, and the words that it and its values take."""
    span: list[Word] = []
    for word in words:
        if word.value.startswith("--"):
            if span:
                yield span[0].value[2:].partition("=")[0], span
            span = [word]
        elif span:
            span.append(word)
    if span:
        yield span[0].value[2:].partition("=")[0], span


def _option(name: str, value: Value) -> str:
    if value is None or value is False:
        return ""
    return f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
