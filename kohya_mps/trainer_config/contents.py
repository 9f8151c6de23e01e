"""What every format of a configuration file shares: its text, and the settings that were read from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError

LARGEST_BYTES = 4_000_000

ACCEPTED = (
    "give the TOML that `train_network.py --config_file` takes, a JSON saved by kohya_ss's GUI, "
    "or a training command pasted into a file"
)

Settings = Mapping[str, Any]


class Contents(msgspec.Struct, frozen=True):
    """What a file says.

    ``settings`` have the trainers' names. ``trainer`` is the script that the file is for,
    empty if the file does not say. ``notes`` are warnings about the file.
    """

    settings: Settings
    trainer: str = ""
    notes: tuple[str, ...] = ()


def read_text(path: Path) -> str:
    """The text of a configuration file, its line ends unchanged.

    Raises:
        UsageError: the file is missing, too large, or not text.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file", ACCEPTED)
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if len(data) > LARGEST_BYTES:
        raise UsageError(
            f"{path} is larger than {LARGEST_BYTES // 1_000_000} MB, too large for settings", ACCEPTED
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error}", "save it as UTF-8") from error
    if "\0" in text:
        raise UsageError(f"{path} is not text: it contains zero bytes", ACCEPTED)
    return text
