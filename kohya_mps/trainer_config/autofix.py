"""``--fix``: a copy of a configuration file with settings changed and everything else byte for byte."""

from __future__ import annotations

import math
import os
from pathlib import Path

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic

from . import command, gui_json, toml
from .config_file import ConfigFile, Kind
from .edits import Corrected, Edit, Value
from .trainer_options import ValueType, WrongType


def autofix(file: ConfigFile, edits: list[Edit]) -> Corrected:
    """The file's text with settings changed.

    Raises:
        StepFailed: the file is written in a way that cannot be edited.
    """
    if file.kind is Kind.TOML:
        return toml.edit(file.text, edits)
    if file.kind is Kind.GUI:
        return gui_json.edit(file.text, edits)
    if file.kind is Kind.COMMAND:
        return command.edit(file.path, file.text, edits)
    return Corrected(file.text, (), tuple(edit.name for edit in edits))


def save(file: ConfigFile, corrected: Corrected, out: Path) -> None:
    """Write the corrected copy.

    Raises:
        UsageError: it would overwrite a file, or its directory does not exist.
        StepFailed: it could not be read again.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} exists and is not overwritten", "give --fix another name")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is not a directory", "give --fix another name")
    _check(file, corrected)
    write_atomic(out, corrected.text.encode())


def coerce(wrong: WrongType) -> Value:
    """The same value with the type that the trainer takes; None if that is not clear."""
    found = wrong.found
    if wrong.expected is ValueType.STRING:
        if isinstance(found, int | float):
            return str(found)
        return ",".join(map(str, found)) if isinstance(found, list) else None
    if wrong.expected is ValueType.BOOLEAN:
        return {"true": True, "false": False}.get(str(found).lower())
    if not isinstance(found, str) or wrong.expected is ValueType.STRINGS:
        return None
    try:
        if wrong.expected is ValueType.INTEGER:
            return int(found) if len(found) < 12 else None
        return float(found) if math.isfinite(float(found)) else None
    except ValueError:
        return None


def _check(file: ConfigFile, corrected: Corrected) -> None:
    """Raise if the corrected text cannot be read."""
    try:
        if file.kind is Kind.TOML:
            toml.parse(file.path, corrected.text)
        elif file.kind is Kind.GUI:
            gui_json.parse(file.path, corrected.text)
    except UsageError as error:
        raise StepFailed(
            f"this file cannot be corrected automatically: {error.what}",
            "change the settings that the report names by hand",
        ) from error
