"""Reports: one data structure, a table for a person and JSON for a program."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec


class Status(StrEnum):
    """The verdict of one check."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Check(msgspec.Struct, frozen=True):
    """One row of a report.

    ``detail`` says what was found, ``fix`` what to type or change when that was not good.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    @classmethod
    def of(cls, name: str, good: bool, detail: str, fix: str = "") -> Check:
        """A check that passes when ``good``; the fix is only told when it does not."""
        return cls(name, Status.PASS if good else Status.FAIL, detail, "" if good else fix)


class Report(msgspec.Struct, frozen=True):
    """What a command found: its checks, and what the command adds to them.

    ``extra`` holds further keys of the JSON; ``summary`` lines follow the table.
    """

    title: str
    checks: tuple[Check, ...]
    extra: Mapping[str, Any] = {}
    summary: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """No check failed; warnings and skipped checks are allowed."""
        return all(check.status is not Status.FAIL for check in self.checks)

    def plus(self, checks: Iterable[Check]) -> Report:
        """The same report with further checks at its end."""
        return msgspec.structs.replace(self, checks=(*self.checks, *checks))


_STYLE = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIP: "dim"}


def to_json(report: Report) -> str:
    """The report as one JSON object: ``ok``, ``checks`` and what the command adds."""
    data = {"ok": report.ok, "checks": report.checks, **report.extra}
    return msgspec.json.format(msgspec.json.encode(data)).decode()


def show(report: Report) -> None:
    """Print the report as a table to standard output, fixes in full below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or a pipe has no width: a table cut to 80 columns would lose paths and commands.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=report.title, title_justify="left", title_style="bold")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        table.add_row(Text(check.name), Text(check.status, _STYLE[check.status]), Text(check.detail))
    if report.checks:
        console.print(table)
    elif report.title:
        console.print(Text(report.title, "bold"))
    for check in report.checks:
        if check.fix and check.status in (Status.FAIL, Status.WARN):
            console.print(Text(f"{check.name}: {check.fix}", "yellow"), soft_wrap=True)
    for line in report.summary:
        console.print(Text(line), soft_wrap=True)


def say(line: str) -> None:
    """Tell the person what happens now; standard error, so that JSON stays alone."""
    print(line, file=sys.stderr, flush=True)
