"""Reports: one data structure that is printed as a table for people or as JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec


class Status(StrEnum):
    """The result of one check."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Check(msgspec.Struct, frozen=True):
    """One row of a report.

    ``detail`` says what was found, ``fix`` what to type or change if that is not good.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    @classmethod
    def of(cls, name: str, good: bool, detail: str, fix: str = "") -> Check:
        """A check that passes if ``good``; only a failed one has the fix."""
        return cls(name, Status.PASS if good else Status.FAIL, detail, "" if good else fix)


class Report(msgspec.Struct, frozen=True):
    """What a command found.

    ``extra`` has further keys for the JSON; the lines of ``summary`` follow the table.
    """

    title: str
    checks: tuple[Check, ...]
    extra: Mapping[str, Any] = {}
    summary: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings and skipped checks are allowed."""
        return all(check.status is not Status.FAIL for check in self.checks)

    def plus(self, checks: Iterable[Check]) -> Report:
        """This report with further checks at its end."""
        return msgspec.structs.replace(self, checks=(*self.checks, *checks))


_STYLE = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIP: "dim"}


def to_json(report: Report) -> str:
    """The report as one JSON object: ``ok``, ``checks`` and the keys of ``extra``."""
    data = {"ok": report.ok, "checks": report.checks, **report.extra}
    return msgspec.json.format(msgspec.json.encode(data)).decode()


def show(report: Report) -> None:
    """Print the report as a table to standard output, with the fixes in full below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or a pipe has no width; in the default of 80 columns paths and commands would be wrapped.
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
    """Print a line about the progress to standard error: standard output is for the report."""
    print(line, file=sys.stderr, flush=True)
