"""The rules of the known failures: which failures are ahead, judged by facts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from kohya_mps.core.report import Check, Status
from kohya_mps.core.settings import Profile

from .catalogue import Condition, Failure, Level, Rule

FactValues = Mapping[str, Any]


class Target(msgspec.Struct, frozen=True):
    """What facts are judged for: a device, and a profile with the versions in its lock."""

    device: str
    profile_name: str
    profile: Profile
    versions: Mapping[str, str]


class Finding(msgspec.Struct, frozen=True):
    """A failure that is ahead, and the rule that says so; ``detail`` is what was found."""

    failure: Failure
    rule: Rule
    detail: str

    def check(self) -> Check:
        """The row of the report."""
        status = Status.FAIL if self.rule.level is Level.FAIL else Status.WARN
        return Check(self.rule.about, status, f"{self.detail}: {self.failure.cause}", self.failure.remedy)


def matching(
    failures: tuple[Failure, ...],
    where: Literal["settings", "environment"],
    facts: FactValues,
    target: Target,
) -> Iterator[Finding]:
    """The failures that these facts lead to, each by the first of its rules that holds.

    Args:
        failures: the known failures.
        where: which of their rules are evaluated.
        facts: the collected values, by the names that the rules use.
        target: what the facts are judged for.
    """
    allowed = {"mixed_precision": target.profile.mixed_precision.get(target.device, ("no",))}
    for failure in failures:
        if target.device not in failure.devices:
            continue
        if failure.profiles and target.profile_name not in failure.profiles:
            continue
        for rule in getattr(failure, where):
            if _lock_fits(rule.lock, target.versions) and all(_holds(c, facts, allowed) for c in rule.when):
                values = {**facts, "device": target.device, "profile": target.profile_name}
                yield Finding(failure, rule, rule.found.format_map(values))
                break


def _holds(condition: Condition, facts: FactValues, allowed: Mapping[str, tuple[str, ...]]) -> bool:
    value = facts.get(condition.of)
    if condition.known is not None:
        return (value is not None) is condition.known
    if value is None:
        return False
    return (
        (condition.equals is msgspec.UNSET or value == condition.equals)
        and (not condition.one_of or value in condition.one_of)
        and (not condition.matches or re.search(condition.matches, str(value), re.IGNORECASE) is not None)
        and (condition.above is None or _difference(value, condition.above, facts) > 0)
        and (condition.below is None or _difference(value, condition.below, facts) < 0)
        and (not condition.version or _satisfies(str(value), condition.version))
        and (condition.allowed is None or (str(value) in allowed.get(condition.of, ())) is condition.allowed)
    )


def _difference(value: Any, bound: float | str, facts: FactValues) -> float:
    """How much a value is above a bound; 0, neither above nor below, if one of them is no number."""
    other = facts.get(bound) if isinstance(bound, str) else bound
    if not isinstance(value, int | float) or not isinstance(other, int | float):
        return 0
    return value - other


def _lock_fits(specifiers: Mapping[str, str], versions: Mapping[str, str]) -> bool:
    for package, specifier in specifiers.items():
        locked = versions.get(package)
        if specifier == "absent":
            if locked is not None:
                return False
        elif locked is None or not _satisfies(locked, specifier):
            return False
    return True


def _satisfies(version: str, specifier: str) -> bool:
    try:
        return Version(version) in SpecifierSet(specifier, prereleases=True)
    except InvalidVersion:
        return False
