from __future__ import annotations

import re

from devtools.mutants import survivors
from devtools.mutants.survivors import Mutant, Reason
from kohya_mps.core.report import Report, Status
from kohya_mps.core.settings import ROOT, read_yaml

# Twenty mutants, of which so many survive.
NOTICED = [Mutant("a.b", f"f: {n} -> {n + 1}", survived=False) for n in range(17)]
SURVIVED = [Mutant("a.c", f"g: {n} -> {n + 1}", survived=True) for n in range(3)]
LISTED = Reason("they change nothing", tuple(one.name for one in SURVIVED))


def failed(report: Report) -> list[tuple[str, str]]:
    return [(check.name, check.detail) for check in report.checks if check.status is Status.FAIL]


def test_survivors_with_a_reason_are_good_while_enough_is_noticed() -> None:
    report = survivors.judge(NOTICED + SURVIVED, [LISTED])

    assert report.ok
    assert report.extra == {"killed": 17, "mutants": 20, "share": 85.0}
    assert [check.detail for check in report.checks] == [
        "17 of 17 noticed (100 %)", "0 of 3 noticed (0 %)", "17 of 20 noticed (85 %); at least 85 %",
    ]  # fmt: skip


def test_a_survivor_without_a_reason_fails() -> None:
    report = survivors.judge(NOTICED + SURVIVED, [Reason("two of them", LISTED.mutants[:2])])

    assert failed(report) == [("new survivor", "a.c.g: 2 -> 3")]


def test_a_share_below_the_floor_fails_whatever_is_listed() -> None:
    report = survivors.judge(NOTICED[1:] + SURVIVED, [LISTED])

    assert failed(report) == [("all", "16 of 19 noticed (84 %); at least 85 %")]


def test_an_entry_that_no_longer_survives_is_a_warning() -> None:
    report = survivors.judge(NOTICED, [Reason("gone", ("a.b.f: 0 -> 1",))])

    assert report.ok
    assert [(check.name, check.detail) for check in report.checks if check.status is Status.WARN] == [
        ("no survivor", "a.b.f: 0 -> 1")
    ]


def test_the_list_can_be_read_and_names_modules_that_are_tried() -> None:
    tried = re.findall(r'"(kohya_mps/\w+/\w+)\.py",', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for reason in read_yaml(survivors.LIST, list[Reason]):
        assert reason.reason
        for name in reason.mutants:
            assert name.partition(": ")[0].split(".")[:3] in [module.split("/") for module in tried]
