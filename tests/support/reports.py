"""What tests ask of a report and of a directory before and after."""

from __future__ import annotations

from pathlib import Path

from kohya_mps.core.report import Check, Report, Status


def statuses(report: Report) -> dict[str, Status]:
    """The status of each check by its name."""
    return {check.name: check.status for check in report.checks}


def failed(report: Report) -> dict[str, Check]:
    """The checks that failed, by name."""
    return {check.name: check for check in report.checks if check.status is Status.FAIL}


def warned(report: Report) -> dict[str, Check]:
    """The checks that warn, by name."""
    return {check.name: check for check in report.checks if check.status is Status.WARN}


def detail(report: Report, name: str) -> str:
    """What a check found."""
    return next(check.detail for check in report.checks if check.name == name)


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """The time and size of every path below ``root``, except the lock and git's index.

    Each run takes the lock, and git refreshes its index.
    """
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in root.rglob("*")
        if path.name not in ("index", "lock") and not path.is_dir()
    }
