"""What can go wrong, and the exit code that each kind of it ends with."""

from __future__ import annotations

import shlex
from pathlib import Path

GOOD = 0
FAILED = 1
USAGE = 2
BUSY = 3
INTERRUPTED = 130


class KohyaError(Exception):
    """Something that a person can mend: what is wrong, and what to type next.

    Args:
        what: one or more lines that say what was found.
        fix: the command or the change that mends it.
    """

    exit_code = FAILED

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.fix}" if self.fix else self.what


class StepFailed(KohyaError):
    """A step or a check did not succeed (exit code 1)."""


class UsageError(KohyaError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = USAGE


class Busy(KohyaError):
    """Another run holds this installation (exit code 3)."""

    exit_code = BUSY


class Stopped(KohyaError):
    """The person ended it, and what was done so far is kept (exit code 130)."""

    exit_code = INTERRUPTED


def restores(path: Path) -> str:
    """The remedy for a file of this project's own that was spoilt."""
    return f"`git checkout -- {shlex.quote(str(path))}` restores it"
