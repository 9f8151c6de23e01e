"""A training command, pasted or in a script: read as argparse reads it, and edited."""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError

from . import toml
from .contents import ACCEPTED, Contents, read_text
from .edits import Change, Corrected, Edit, Value, one_line, replace_spans
from .shell_words import Word, commands
from .trainer_options import NAMES

_TRAINER = re.compile(r"(?:\w*train\w*|fine_tune)\.py")
_BATCH_FILES = frozenset({".bat", ".cmd"})
_WINDOWS_SCRIPTS = _BATCH_FILES | {".ps1"}
_SCRIPTS = _WINDOWS_SCRIPTS | {".sh", ".command"}

# The options that take any number of values (``nargs`` in sd-scripts' ``add_argument`` calls).
_LISTS = frozenset({"network_args", "optimizer_args", "lr_scheduler_args", "text_encoder_lr", "base_weights"})


class Option(msgspec.Struct, frozen=True):
    """An option of a command: its first word is ``--name`` or ``--name=value``."""

    words: tuple[Word, ...]

    @property
    def name(self) -> str:
        """The name without the dashes."""
        return self.words[0].value[2:].partition("=")[0]

    @property
    def value(self) -> str | list[str] | bool:
        """The value as argparse takes it: True if there is none."""
        _, equals, first = self.words[0].value.partition("=")
        values = [*([first] if equals else []), *(word.value for word in self.words[1:])]
        if self.name in _LISTS:
            return values
        return values[0] if values else True

    @property
    def span(self) -> tuple[int, int]:
        """Where the option begins and ends in the text."""
        return self.words[0].start, self.words[-1].end


class _Training(msgspec.Struct, frozen=True):
    """A command that trains: its words up to the trainer's script, the script, and all options.

    ``script`` is empty if only options were pasted.
    """

    words: list[Word]
    launcher: tuple[Option, ...]
    script: str
    options: tuple[Option, ...]

    def named(self, name: str) -> list[Option]:
        """The options that set this; argparse takes the last one."""
        if name == "launch_cpu":
            # Flags: a script that stands after one is not its value.
            return [Option(o.words[:1]) for o in self.launcher if o.name in {"cpu", "use_cpu"}]
        return [option for option in self.options if option.name == name]


def is_command(path: Path, text: str) -> bool:
    """Whether a file is a script or a pasted command, judged by its name, then by its text."""
    if path.suffix.lower() in _SCRIPTS:
        return True
    has_options = re.search(r"(^|\s)--[a-z][\w]*", text) is not None
    begins_like_toml = re.match(r"\s*(\[|[\w.\"-]+[ \t]*=[ \t])", text) is not None
    return path.suffix.lower() != ".toml" and has_options and not begins_like_toml


def read(path: Path, text: str) -> Contents:
    """The settings of the first training command in a script.

    Raises:
        UsageError: there is none, or the TOML that it names cannot be read.
    """
    trainings = _trainings(path, text)
    if not trainings:
        raise UsageError(f"{path} contains no training command", ACCEPTED)
    training = trainings[0]
    notes = [f"{len(trainings)} training commands: the first was checked"] if len(trainings) > 1 else []
    settings = _settings(path, training)
    unknown = sorted(n for n, v in settings.items() if n in NAMES and isinstance(v, str) and "$" in v)
    if unknown:
        notes.append(f"left out, because their variables are set elsewhere: {', '.join(unknown)}")
    known = {name: value for name, value in settings.items() if name not in unknown}
    return Contents(known, training.script, tuple(notes))


def edit(path: Path, text: str, edits: list[Edit]) -> Corrected:
    """The text with options of its first training command changed.

    Comments say what was changed. They stand above the command, because none can stand
    between continued lines. What a TOML sets that the command names cannot be removed here.

    Args:
        path: the script; its ending says how it writes comments.
        text: its text, with a training command in it.
        edits: what to change.
    """
    training = _trainings(path, text)[0]
    changes: list[Change] = []
    spans: list[tuple[int, int, str]] = []
    for change in edits:
        found, new = training.named(change.name), _option(change.name, change.value)
        if found:
            spans += [(*option.span, new) for option in (found[-1:] if new else found)]
        elif new:
            end = training.words[-1].end
            spans.append((end, end, f" {new}"))
        else:
            continue
        was = text[slice(*found[-1].span)] if found else ""
        changes.append(Change(change.name, was, new, change.why))
    if changes:
        start = text.rfind("\n", 0, training.words[0].start) + 1
        spans.append((start, start, _notes(path, text, changes)))
    corrected = replace_spans(text, spans)
    # Pasted options of which too few are left are no training any more.
    settings = _settings(path, left[0]) if (left := _trainings(path, corrected)) else {}
    still_set = (e.name for e in edits if not _option(e.name, e.value) and settings.get(e.name))
    return Corrected(corrected, tuple(changes), tuple(still_set))


def options(words: list[Word]) -> tuple[Option, ...]:
    """The options of a command, each with the words up to the next one."""
    starts = [at for at, word in enumerate(words) if word.value.startswith("--")]
    ends = [*starts, len(words)][1:]
    return tuple(Option(tuple(words[start:end])) for start, end in zip(starts, ends, strict=True))


def _trainings(path: Path, text: str) -> list[_Training]:
    found = []
    for words in commands(text, _is_windows(path, text)):
        scripts = [
            at for at, word in enumerate(words) if _TRAINER.fullmatch(PureWindowsPath(word.value).name)
        ]
        if scripts:
            at = scripts[-1]  # a script that starts the trainer may stand before it
            script = PureWindowsPath(words[at].value).name
            found.append(_Training(words, options(words[:at]), script, options(words[at + 1 :])))
        elif words[0].value.startswith("--"):
            pasted = options(words)
            if len({option.name for option in pasted} & NAMES) >= 2:
                found.append(_Training(words, (), "", pasted))
    return found


def _settings(path: Path, training: _Training) -> dict[str, Any]:
    """All settings of a training: its options, and those of the TOML that it names."""
    settings: dict[str, Any] = {option.name: option.value for option in training.options}
    if isinstance(config := settings.pop("config_file", None), str):
        settings = _config_file(path, config) | settings
    settings["launch_cpu"] = any(option.value for option in training.named("launch_cpu"))
    return settings


def _is_windows(path: Path, text: str) -> bool:
    """Whether a script is for PowerShell or cmd, where a backslash belongs to a path."""
    return path.suffix.lower() in _WINDOWS_SCRIPTS or bool(
        re.search(r"[`^][ \t]*\r?\n|(^|[\s\"'=])[A-Za-z]:\\", text)
    )


def _config_file(path: Path, config: str) -> dict[str, Any]:
    """The TOML that a command names. The trainer adds the ending if it is missing."""
    named = Path(config if config.endswith(".toml") else f"{config}.toml").expanduser()
    found = next((p for p in (named, path.parent / named) if p.is_file()), named)
    return toml.flatten(toml.parse(found, read_text(found)))


def _notes(path: Path, text: str, changes: list[Change]) -> str:
    mark = "REM" if path.suffix.lower() in _BATCH_FILES else "#"
    line_end = "\r\n" if "\r\n" in text else "\n"
    return "".join(
        f"{mark} preflight: {one_line(c.was) or 'added'} -> {c.now or 'left out'}; {one_line(c.why)}{line_end}"
        for c in changes
    )


def _option(name: str, value: Value) -> str:
    if value is None or value is False:
        return ""
    return f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
