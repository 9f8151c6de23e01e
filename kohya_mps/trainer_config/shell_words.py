"""The words of a pasted shell command, each with its position in the text.

``shlex`` loses the positions, which a corrected copy needs. It also knows neither the line
continuations of PowerShell and cmd nor the assignments above a command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

_SEPARATORS = ("&&", "||", ";", "|", "&", "\n")
_VARIABLE = re.compile(r"\$(?:env:)?\{?([A-Za-z_]\w*)\}?|%([A-Za-z_]\w*)%")
_ASSIGNMENT = re.compile(r"\$?([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Word(msgspec.Struct, frozen=True):
    """One word: what the program would get, and where it is in the text."""

    value: str
    start: int
    end: int


def commands(text: str, windows: bool) -> list[list[Word]]:
    """The commands of a script. A variable that the script sets is replaced by its value.

    Args:
        text: the script; a quote that is not closed reaches to its end.
        windows: whether a backslash is a character of a path, as in PowerShell and cmd.
    """
    found: list[list[Word]] = []
    variables: dict[str, str] = {}
    for words in _split(text, windows):
        filled = [msgspec.structs.replace(word, value=_fill(word.value, variables)) for word in words]
        rest = _assign(filled, variables)
        if rest:
            found.append(rest)
    return found


def _split(text: str, windows: bool) -> Iterator[list[Word]]:
    command: list[Word] = []
    at, end = 0, len(text)
    while at < end:
        character = text[at]
        if skipped := _continuation(text, at, windows):
            at += skipped
        elif separator := next((s for s in _SEPARATORS if text.startswith(s, at)), ""):
            if command:
                yield command
            command = []
            at += len(separator)
        elif character.isspace():
            at += 1
        elif character == "#":
            at = _line_end(text, at)
        else:
            word = _word(text, at, windows)
            command.append(word)
            at = word.end
    if command:
        yield command


def _word(text: str, start: int, windows: bool) -> Word:
    pieces: list[str] = []
    at, end, quote = start, len(text), ""
    while at < end:
        character = text[at]
        if quote:
            if character == quote:
                quote = ""
            elif (
                character == "\\"
                and quote == '"'
                and not windows
                and text[at + 1 : at + 2] in {'"', "\\", "$"}
            ):
                at += 1
                pieces.append(text[at])
            else:
                pieces.append(character)
        elif character in "'\"":
            quote = character
        elif _continuation(text, at, windows) or character.isspace() or text.startswith(_SEPARATORS, at):
            break
        elif character == "\\" and not windows:
            at += 1
            pieces.append(text[at : at + 1])
        else:
            pieces.append(character)
        at += 1
    return Word("".join(pieces), start, min(at, end))


def _continuation(text: str, at: int, windows: bool) -> int:
    """The length of a line continuation at this position; 0 if there is none."""
    marks = "`^\\" if windows else "\\"
    if text[at] not in marks:
        return 0
    found = re.compile(r"[ \t]*\r?\n").match(text, at + 1)
    return found.end() - at if found else 0


def _line_end(text: str, at: int) -> int:
    found = text.find("\n", at)
    return len(text) if found < 0 else found


def _fill(value: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[0]), value)


def _assign(words: list[Word], variables: dict[str, str]) -> list[Word]:
    """Read the assignments at the beginning of a command, and return the words after them."""
    if words and words[0].value in {"export", "set", "env"}:
        words = words[1:]
    if len(words) >= 3 and words[1].value == "=" and words[0].value.startswith("$"):
        # A computed value is not known here: the variable is left as it is.
        if len(words) == 3 and not words[2].value.startswith(("[", "(", "$(")):
            variables[words[0].value[1:]] = words[2].value
        return []
    while words and (found := _ASSIGNMENT.fullmatch(words[0].value)):
        variables[found[1]] = found[2]
        words = words[1:]
    return words
