"""The known failures: data in ``config/failures.yaml``, and what decides whether one is ahead.

Preflight, doctor, explain and the README's table all read the same entries. An entry says
where it can be seen: in the settings of a training, in the environment, or in a log. The
first two are rules over *facts*: named values that preflight or doctor found out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from kohya_mps.core.errors import UsageError, restores
from kohya_mps.core.files import write_atomic
from kohya_mps.core.report import Check, Status
from kohya_mps.core.settings import CONFIG, Profile, read_yaml

FactValues = Mapping[str, Any]

DEVICES = ("mps", "cuda", "cpu")
PATH = CONFIG / "failures.yaml"


class Level(StrEnum):
    """How bad it is: it cannot work, or it works and is unwise."""

    FAIL = "fail"
    WARN = "warn"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Condition(_Strict, frozen=True):
    """What has to hold for one fact. A fact that is not known fulfils nothing but ``known: false``.

    ``above`` and ``below`` compare with a number or with the fact of that name, ``version``
    with a specifier as pip writes it; ``allowed: false`` holds for a value that the
    profile's list of the same name leaves out for the device.
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

    def holds(self, facts: FactValues, allowed: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether the fact fulfils everything that is asked of it."""
        value = facts.get(self.of)
        if self.known is not None:
            return (value is not None) is self.known
        if value is None:
            return False
        return (
            (self.equals is msgspec.UNSET or value == self.equals)
            and (not self.one_of or value in self.one_of)
            and (not self.matches or re.search(self.matches, str(value), re.IGNORECASE) is not None)
            and (self.above is None or _compare(value, self.above, facts, 1))
            and (self.below is None or _compare(value, self.below, facts, -1))
            and (not self.version or _satisfies(str(value), self.version))
            and (self.allowed is None or (str(value) in allowed.get(self.of, ())) is self.allowed)
        )

    def names(self) -> Iterator[str]:
        """The facts that this condition looks at."""
        yield self.of
        yield from (other for other in (self.above, self.below) if isinstance(other, str))


class Rule(_Strict, frozen=True):
    """When a failure is ahead: every condition holds, and the lock is one that it holds with.

    ``about`` is the row of the report, ``found`` what it says (facts in braces are filled
    in), ``change`` the settings that mend it (null takes one out). ``lock`` asks for
    versions in the profile's lock; ``absent`` for a package that is not in it.
    """

    about: str
    when: tuple[Condition, ...]
    found: str
    level: Level = Level.FAIL
    change: dict[str, bool | int | float | str | None] = {}
    lock: dict[str, str] = {}


class LogPattern(_Strict, frozen=True):
    """What a log says: ``text`` with any white space between its words; ``after``, when given,
    stands at most 4 KB before it, as the frames of a traceback do."""

    text: str
    after: str = ""


class Failure(_Strict, frozen=True):
    """One known failure: what a person sees, why, what mends it, and who reported it."""

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


class Target(msgspec.Struct, frozen=True):
    """What a training is checked for: a device, and a profile with the versions of its lock."""

    device: str
    profile_name: str
    profile: Profile
    versions: Mapping[str, str]


class Finding(msgspec.Struct, frozen=True):
    """A failure that is ahead, by one of its rules."""

    failure: Failure
    rule: Rule
    detail: str

    def check(self) -> Check:
        """The report's row."""
        status = Status.FAIL if self.rule.level is Level.FAIL else Status.WARN
        return Check(self.rule.about, status, f"{self.detail}: {self.failure.cause}", self.failure.remedy)


def load(path: Path = PATH) -> tuple[Failure, ...]:
    """Read the known failures.

    Raises:
        UsageError: for a wrong shape, an entry that can be seen nowhere and does not say
            why, and everything else in it that cannot be meant.
    """
    known = read_yaml(path, _File).failures
    for index, failure in enumerate(known):
        if problem := _problem(failure, known[:index]):
            raise UsageError(f"{path}: {failure.id}: {problem}", restores(path))
    return known


@cache
def known() -> tuple[Failure, ...]:
    """The failures of ``config/failures.yaml``, read once."""
    return load()


def matching(
    failures: tuple[Failure, ...], where: str, facts: FactValues, situation: Target
) -> Iterator[Finding]:
    """The failures that these facts lead to.

    Args:
        failures: the known ones.
        where: ``settings`` or ``environment``.
        facts: what was found out, by the names that the rules use.
        situation: what the facts are judged for.
    """
    allowed = {"mixed_precision": situation.profile.mixed_precision.get(situation.device, ("no",))}
    for failure in failures:
        if situation.device not in failure.devices:
            continue
        if failure.profiles and situation.profile_name not in failure.profiles:
            continue
        for rule in getattr(failure, where):
            if _fits(rule.lock, situation.versions) and all(c.holds(facts, allowed) for c in rule.when):
                filled = {**facts, "device": situation.device, "profile": situation.profile_name}
                yield Finding(failure, rule, rule.found.format_map(filled))
                break


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


def source_url(source: str) -> str:
    """The address of an upstream thread written as ``owner/name#number``; empty for anything else."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)#(\d+)", source)
    return f"https://github.com/{found[1]}/issues/{found[2]}" if found else ""


def _link(source: str) -> str:
    url = source_url(source)
    return f"[{source}]({url})" if url else source


def _fits(lock: Mapping[str, str], versions: Mapping[str, str]) -> bool:
    for package, wanted in lock.items():
        installed = versions.get(package)
        if wanted == "absent":
            if installed is not None:
                return False
        elif installed is None or not _satisfies(installed, wanted):
            return False
    return True


def _satisfies(version: str, specifier: str) -> bool:
    try:
        return Version(version) in SpecifierSet(specifier, prereleases=True)
    except InvalidVersion:
        return False


def _compare(value: Any, bound: float | str, facts: FactValues, sign: int) -> bool:
    other = facts.get(bound) if isinstance(bound, str) else bound
    if not isinstance(value, int | float) or not isinstance(other, int | float):
        return False
    return (value - other) * sign > 0


def _problem(failure: Failure, before: tuple[Failure, ...]) -> str:
    if any(other.id == failure.id for other in before):
        return "there is another entry with this id"
    if not (failure.settings or failure.environment or failure.log or failure.note):
        return "it can be seen nowhere, and no note says why"
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
    if any(not sign.text.strip() for sign in failure.log):
        return "log: a sign without text would always be found"
    return ""
