"""The rules: what each field of a condition demands, and which lock, device and profile a rule is for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.report import Status
from kohya_mps.known_failures import rules
from kohya_mps.known_failures.catalogue import Condition, Failure, Level, Rule
from kohya_mps.known_failures.rules import Finding, Target


@pytest.fixture
def mac() -> Target:
    """A Mac with a lock of one package."""
    return Target("mps", "validated", settings.load().profile, {"torch": "2.5.1"})


def failure(*rules: Rule, **fields: Any) -> Failure:
    return Failure("x", "seen", "the cause", "the remedy", (), settings=rules, **fields)


def rule(*conditions: Condition, **fields: Any) -> Rule:
    return Rule("row", conditions or (Condition("steps", known=True),), "{steps} steps", **fields)


def findings(target: Target, *failures: Failure, **facts: Any) -> list[Finding]:
    return list(rules.matching(failures, "settings", {"steps": 5, **facts}, target))


@pytest.mark.parametrize(
    ("condition", "holds", "fails"),
    [
        ({"equals": True}, True, False),
        ({"equals": 0}, 0, 1),
        ({"one_of": ("a", "b")}, "b", "c"),
        ({"matches": "SD[0-9]"}, "my sd3 model", "my sd model"),
        ({"above": 8}, 8.5, 8),
        ({"below": 8}, 7.5, 8),
        ({"above": "steps"}, 6, 5),
        ({"below": "steps"}, 4, 5),
        ({"version": "<2.6"}, "2.5.1+cpu", "2.6"),
        ({"version": ">=2.6"}, "2.7.0.dev1", "2.6.0rc1"),
        ({"version": "==2.*"}, "2.1rc1", "3.0"),
        ({"above": 1, "below": 9}, 5, 10),
        ({"known": True}, 0, None),
        ({"known": False}, None, 0),
    ],
)
def test_a_condition_holds_for_one_value_and_not_for_its_neighbour(
    condition: dict[str, Any], holds: object, fails: object, mac: Target
) -> None:
    one = failure(rule(Condition("fact", **condition)))
    assert findings(mac, one, fact=holds)
    assert not findings(mac, one, fact=fails)


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ({"equals": False}, None),
        ({"below": 8}, None),
        ({"below": 8}, "many"),
        ({"above": 8}, "many"),
        ({"below": "no such fact"}, 1),
        ({"above": "no such fact"}, 1),
        ({"version": ">0"}, "not a version"),
        ({"allowed": False}, None),
    ],
)
def test_what_is_not_known_or_cannot_be_compared_fulfils_no_condition(
    condition: dict[str, Any], value: object, mac: Target
) -> None:
    assert not findings(mac, failure(rule(Condition("fact", **condition))), fact=value)


def test_every_condition_of_a_rule_has_to_hold(mac: Target) -> None:
    both = failure(rule(Condition("a", equals=1), Condition("b", equals=2)))
    assert findings(mac, both, a=1, b=2)
    assert not findings(mac, both, a=1, b=3)
    assert not findings(mac, both, a=0, b=2)


def test_a_failure_is_reported_once_by_its_first_rule_that_holds(mac: Target) -> None:
    first, second, third = (rule(Condition("a", below=bound)) for bound in (1, 10, 100))
    assert [found.rule for found in findings(mac, failure(first, second, third), a=5)] == [second]


def test_the_row_says_what_was_found_why_and_what_mends_it(mac: Target) -> None:
    strict = failure(Rule("row", (Condition("steps", known=True),), "{steps} steps on {device}, {profile}"))
    check = findings(mac, strict)[0].check()
    assert (check.name, check.status) == ("row", Status.FAIL)
    assert (check.detail, check.fix) == ("5 steps on mps, validated: the cause", "the remedy")
    assert findings(mac, failure(rule(level=Level.WARN)))[0].check().status is Status.WARN


@pytest.mark.parametrize(
    ("lock", "holds"),
    [
        ({"torch": "<2.6"}, True),
        ({"torch": ">=2.6"}, False),
        ({"lycoris": "<2.6"}, False),
        ({"lycoris": "absent"}, True),
        ({"torch": "absent"}, False),
        ({"torch": "<2.6", "lycoris": "absent"}, True),
        ({"lycoris": "absent", "torch": ">=2.6"}, False),
    ],
)
def test_a_rule_holds_only_with_the_lock_it_names(lock: dict[str, str], holds: bool, mac: Target) -> None:
    assert bool(findings(mac, failure(rule(lock=lock)))) is holds


def test_a_failure_of_another_device_or_profile_is_passed_over(mac: Target) -> None:
    assert findings(mac, failure(rule(), devices=("mps",), profiles=("validated",)))
    assert not findings(mac, failure(rule(), devices=("cuda", "cpu")))
    assert not findings(mac, failure(rule(), profiles=("latest",)))
    # The ones after it are not.
    others = failure(rule(), devices=("cpu",)), failure(rule(), profiles=("latest",))
    last = failure(rule())
    assert [found.failure for found in findings(mac, *others, last, last)] == [last, last]


def test_the_profile_says_which_mixed_precision_a_device_has(mac: Target) -> None:
    refused = failure(rule(Condition("mixed_precision", allowed=False)))
    allowed = failure(rule(Condition("mixed_precision", allowed=True)))
    profile = msgspec.structs.replace(mac.profile, mixed_precision={"mps": ("no", "bf16")})
    target = msgspec.structs.replace(mac, profile=profile)

    assert findings(target, refused, mixed_precision="fp16")
    assert not findings(target, refused, mixed_precision="bf16")
    assert findings(target, allowed, mixed_precision="bf16")
    # A fact that the profile has no list for is not allowed.
    assert findings(mac, failure(rule(Condition("steps", allowed=False))))
    # A device that the profile does not name has no mixed precision.
    cpu = msgspec.structs.replace(target, device="cpu")
    assert findings(cpu, refused, mixed_precision="bf16")
    assert findings(cpu, allowed, mixed_precision="no")
