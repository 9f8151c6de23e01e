"""The errors that a person can mend, and the exit codes."""

from __future__ import annotations

import shlex
from pathlib import Path

GOOD = 0
FAILED = 1
USAGE = 2
BUSY = 3
INTERRUPTED = 130


class KohyaError(Exception):
    """An error that a person can mend: it says what is wrong, and what to type next.

    Args:
        what: one or more lines about what was found.
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
    """The command or the configuration is wrong (exit code 2)."""

    exit_code = USAGE


class Busy(KohyaError):
    """Another run uses this installation (exit code 3)."""

    exit_code = BUSY


class Stopped(KohyaError):
    """A person ended it; what was done until then is kept (exit code 130)."""

    exit_code = INTERRUPTED


def restores(path: Path) -> str:
    """The remedy for a damaged or missing file of this project."""
    return f"`git checkout -- {shlex.quote(str(path))}` restores it"
