"""Text for people: without terminal colours, shortened, and with sizes they can read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import AnyStr

# Colours and cursor movements (CSI), and window titles and links (OSC).
_ESCAPE = r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"
_ESCAPE_IN_STR = re.compile(_ESCAPE)
_ESCAPE_IN_BYTES = re.compile(_ESCAPE.encode())


def strip_ansi(text: AnyStr) -> AnyStr:
    """Remove the escape sequences that programs draw with in a terminal."""
    if isinstance(text, bytes):
        return _ESCAPE_IN_BYTES.sub(b"", text) if b"\x1b" in text else text
    return _ESCAPE_IN_STR.sub("", text) if "\x1b" in text else text


def shorten(text: str, most: int) -> str:
    """The first ``most`` characters, and an ellipsis when there are more."""
    return text if len(text) <= most else f"{text[:most]}…"


def join_some(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first ``most`` items, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def format_size(count: float) -> str:
    """A number of bytes in MB or GB (powers of ten), with three digits: ``9.44 MB``, ``12.3 GB``."""
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {unit}"
