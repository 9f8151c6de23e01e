"""The catalogue of known failures: the shape of ``config/failures.yaml``, and reading it.

Preflight, doctor, explain and docs/troubleshooting.md all use the same entries. An entry
says where a failure shows: in the settings of a training, in the environment, or in a log.
For the first two it has rules over *facts*: named values that preflight or doctor collected
(``rules.py`` evaluates them). For the last it has patterns (``log_search.py`` finds them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from pathlib import Path

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from kohya_mps.core.errors import UsageError, restores
from kohya_mps.core.settings import CONFIG, read_yaml

DEVICES = ("mps", "cuda", "cpu")
PATH = CONFIG / "failures.yaml"


class Level(StrEnum):
    """How bad a failure is: the training cannot work, or it works but this is unwise."""

    FAIL = "fail"
    WARN = "warn"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Condition(_Strict, frozen=True):
    """What has to be true of one fact; with several fields, all of them.

    A fact that is not known fulfils no condition except ``known: false``.

    Fields:
        of: the name of the fact.
        equals: the value (``is`` in the file).
        one_of: the values that it may have.
        matches: a regular expression that is found in it, in any case of letters.
        above, below: a number, or the name of another fact, that it is compared with.
        version: a specifier as pip writes it, such as ``<2.6``.
        known: whether the fact is known at all.
        allowed: whether the profile's list of that name has the value for this device.
    """

    of: str
    equals: bool | int | float | str | msgspec.UnsetType = msgspec.field(name="is", default=msgspec.UNSET)
    one_of: tuple[str | int, ...] = ()
    matches: str = ""
    above: float | str | None = None
    below: float | str | None = None
    version: str = ""
    known: bool | None = None
    allowed: bool | None = None

    def names(self) -> Iterator[str]:
        """The facts that this condition reads."""
        yield self.of
        yield from (other for other in (self.above, self.below) if isinstance(other, str))


class Rule(_Strict, frozen=True):
    """When a failure is ahead: every condition holds, and the profile's lock is affected.

    Fields:
        about: the name of the report's row.
        when: the conditions.
        found: what the row says; ``{name}`` stands for the fact of that name.
        level: whether the row fails or warns.
        change: the settings that ``--fix`` writes; ``null`` removes one.
        lock: specifiers of packages in the profile's lock; ``absent`` for one that it lacks.
    """

    about: str
    when: tuple[Condition, ...]
    found: str
    level: Level = Level.FAIL
    change: dict[str, bool | int | float | str | None] = {}
    lock: dict[str, str] = {}


class LogPattern(_Strict, frozen=True):
    """Words in a log that show a failure.

    ``text`` is found with any white space between its words. ``after``, if set, has to stand
    at most 4 KB before it, as the frames of a traceback do.
    """

    text: str
    after: str = ""


class Failure(_Strict, frozen=True):
    """One known failure: what a person sees, its cause, its remedy, and where it was reported."""

    id: str
    seen: str
    cause: str
    remedy: str
    sources: tuple[str, ...]
    devices: tuple[str, ...] = DEVICES
    profiles: tuple[str, ...] = ()
    settings: tuple[Rule, ...] = ()
    environment: tuple[Rule, ...] = ()
    log: tuple[LogPattern, ...] = ()
    note: str = ""


class _File(_Strict, frozen=True):
    failures: tuple[Failure, ...]


def load(path: Path = PATH) -> tuple[Failure, ...]:
    """Read the known failures.

    Raises:
        UsageError: the file has another shape, or an entry is invalid: its id is used twice,
            a rule or pattern would always apply, a regular expression or specifier is wrong,
            or it shows nowhere and no note says why.
    """
    failures = read_yaml(path, _File).failures
    for index, failure in enumerate(failures):
        if problem := _problem(failure, failures[:index]):
            raise UsageError(f"{path}: {failure.id}: {problem}", restores(path))
    return failures


@cache
def known() -> tuple[Failure, ...]:
    """The failures of ``config/failures.yaml``, read once."""
    return load()


def source_url(source: str) -> str:
    """The address of a GitHub thread written as ``owner/name#number``; empty for any other source."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)#(\d+)", source)
    return f"https://github.com/{found[1]}/issues/{found[2]}" if found else ""


def _problem(failure: Failure, earlier: tuple[Failure, ...]) -> str:
    """What is wrong with an entry; empty if it is good."""
    if any(other.id == failure.id for other in earlier):
        return "there is another entry with this id"
    if not (failure.settings or failure.environment or failure.log or failure.note):
        return "it has no rule and no log pattern, and no note says why"
    if unknown := set(failure.devices) - set(DEVICES):
        return f"devices: {', '.join(sorted(unknown))}; accepted: {', '.join(DEVICES)}"
    for rule in (*failure.settings, *failure.environment):
        if not rule.when:
            return f"{rule.about}: a rule without a condition would always hold"
        for condition in rule.when:
            try:
                re.compile(condition.matches)
                SpecifierSet(condition.version)
            except (re.error, InvalidSpecifier) as error:
                return f"{condition.of}: {error}"
    if any(not pattern.text.strip() for pattern in failure.log):
        return "log: a pattern without text would match every log"
    return ""
