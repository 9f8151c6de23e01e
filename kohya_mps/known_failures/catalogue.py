"""The catalogue of known failures: the shape of ``config/failures.yaml``, and reading it.

Preflight, doctor, explain and the troubleshooting table all use the same entries. An entry
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
from kohya_mps.core.files import write_atomic
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


def table(failures: tuple[Failure, ...]) -> str:
    """The README's troubleshooting table, in Markdown."""
    lines = ["| what you see | why | what mends it | source |", "|---|---|---|---|"]
    for failure in failures:
        cells = (failure.seen, failure.cause, failure.remedy, ", ".join(map(_link, failure.sources)))
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


BEGIN = "<!-- troubleshooting: made from config/failures.yaml by `nox -s readme` -->"
END = "<!-- end of troubleshooting -->"


def with_table(text: str, failures: tuple[Failure, ...]) -> str:
    """A text in which the part between the two markers is the present table.

    Raises:
        UsageError: the markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError("the markers of the troubleshooting table are missing", f"add {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(failures)}\n{END}{after}"


def update(path: Path) -> None:
    """Bring the table in a Markdown file up to date."""
    write_atomic(path, with_table(path.read_text(encoding="utf-8"), known()).encode())


def _link(source: str) -> str:
    url = source_url(source)
    return f"[{source}]({url})" if url else source
