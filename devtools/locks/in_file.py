"""``constraints/NAME.in``: which locks there are, and what each of them requires.

A ``.in`` file is a requirements file with two kinds of comment that have a meaning::

    # exclude-newer: 2026-02-20   releases after this day are ignored
    # override: plain>=1.1        replaces what other distributions require of this one
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError, restores
from kohya_mps.install import lockfile

#: The only Python that the locks are made for: kohya_ss declares ``>=3.10,<3.12`` (its
#: pyproject.toml), and what the locks hold has left 3.10 (networkx 3.6.1).
PYTHON = "3.11"

_CUTOFF = re.compile(r"^# exclude-newer: (\d{4}-\d\d-\d\d)$", re.MULTILINE)
_OVERRIDE = re.compile(r"^# override: (\S.*)$", re.MULTILINE)
_COMMENT = re.compile(r"(^|\s)#.*")


def lock_names() -> list[str]:
    """The locks that exist, in the order in which they have to be made."""
    found = {path.stem: read(path) for path in settings.CONSTRAINTS.glob("*.in")}
    # A lock that is constrained by another one's pins comes after it.
    return sorted(found, key=lambda name: ("\n-c " in found[name], name))


def select(requested: Sequence[str]) -> tuple[str, ...]:
    """The requested locks; every lock when none was requested.

    Raises:
        UsageError: there is no lock of that name.
    """
    if unknown := sorted(set(requested) - set(lock_names())):
        raise UsageError(f"there is no lock {unknown[0]!r}", f"accepted: {', '.join(lock_names())}")
    return tuple(requested or lock_names())


def paths(name: str) -> tuple[Path, Path]:
    """The ``.in`` file of a lock, and the lock."""
    return settings.CONSTRAINTS / f"{name}.in", settings.CONSTRAINTS / f"{name}.txt"


def read(path: Path) -> str:
    """The text of a ``.in`` file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}", restores(path)) from error


def cutoff_of(path: Path, text: str) -> str:
    """The day (YYYY-MM-DD) after which releases are ignored.

    Raises:
        UsageError: the file does not have that line.
    """
    found = _CUTOFF.search(text)
    if not found:
        raise UsageError(
            f"{path}: has no '# exclude-newer: YYYY-MM-DD' line", "add one: it makes the lock repeatable"
        )
    return found[1]


def with_cutoff(text: str, cutoff: str) -> str:
    """The text of a ``.in`` file with another cutoff.

    Raises:
        UsageError: the cutoff is not a day.
    """
    if not _is_day(cutoff):
        raise UsageError(f"--cutoff: {cutoff!r} is not a day", "accepted: YYYY-MM-DD")
    return _CUTOFF.sub(f"# exclude-newer: {cutoff}", text)


def override_lines(text: str) -> list[str]:
    """The requirements behind ``# override:``, as they are written."""
    return _OVERRIDE.findall(text)


def requirements(name: str) -> list[Requirement]:
    """What ``NAME.in`` requires, together with the files that it includes (``-r``).

    Raises:
        UsageError: a file is missing, or a line is not a requirement.
    """
    path, _ = paths(name)
    own = [line for line in inputs(path) if not line.startswith(("-", "exclude-newer ", "override "))]
    return [_requirement(path, line) for line in own]


def overrides(name: str) -> list[Requirement]:
    """What ``NAME.in`` requires in place of what other distributions require (``# override:``).

    Raises:
        UsageError: the file is missing, or a line is not a requirement.
    """
    path, _ = paths(name)
    return [_requirement(path, line) for line in override_lines(read(path))]


def inputs(path: Path) -> tuple[str, ...]:
    """Everything in a ``.in`` file and the files that it includes that decides what the lock holds.

    Sorted and without comments: an edit that changes nothing for the lock changes nothing here.
    The lock's header records these lines.
    """
    text = read(path)
    found = {f"exclude-newer {day}" for day in _CUTOFF.findall(text)}
    found |= {f"override {line}" for line in override_lines(text)}
    for raw in text.splitlines():
        line = _COMMENT.sub("", raw).strip()
        option, _, name = line.partition(" ")
        if option == "-r":
            included = inputs(path.parent / name)
            found |= {entry for entry in included if not entry.startswith(("exclude-newer ", "override "))}
        elif option == "-c":
            pins = lockfile.read(path.parent / name).pins
            found.add(f"-c {name} (its pins: sha256 {hashlib.sha256(repr(pins).encode()).hexdigest()[:16]})")
        elif line:
            found.add(line)
    return tuple(sorted(found))


def _requirement(path: Path, line: str) -> Requirement:
    try:
        return Requirement(line)
    except InvalidRequirement as error:
        raise UsageError(f"{path}: {line!r} is not a requirement: {error}") from error


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
